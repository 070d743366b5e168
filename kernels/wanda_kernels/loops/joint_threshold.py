"""A threshold over the rows of one weight that several processes hold parts of."""

from collections.abc import Callable

import torch
from torch import Tensor

# Sums a small tensor over all processes that hold rows of the weight; all of them call it alike.
SumRows = Callable[[Tensor], Tensor]
# Bits of a score, from the highest down, that one count tells apart. The sign bit is 0.
DIGITS = (11, 10, 10)


def joint_threshold(scores: Tensor, rank: int, sum_rows: SumRows) -> Tensor:
    """The score at sorted position `rank` (0-based) of all processes' scores.

    Args:
        scores: this process's, fp32, not negative, of any shape.
        sum_rows: adds a tensor up over the processes.
    Returns: fp32 scalar, the same on each of them.
    """
    # The bits of scores that are not negative are ordered as the scores are.
    keys = scores.flatten().view(torch.int32)
    above = torch.ones_like(keys, dtype=torch.bool)
    before = torch.tensor(rank, device=keys.device)
    prefix, shift = torch.zeros((), dtype=torch.int32, device=keys.device), sum(DIGITS)
    for width in DIGITS:
        shift -= width
        digits = (keys >> shift) & (2**width - 1)
        counts = torch.zeros(2**width, dtype=torch.int64, device=keys.device)
        reached = sum_rows(counts.scatter_add_(0, digits.long(), above.long())).cumsum(0)
        digit = torch.searchsorted(reached, before, right=True)
        before = before - torch.where(digit > 0, reached[digit - 1], 0)
        prefix = (prefix << width) | digit.int()
        above = (keys >> shift) == prefix
    return prefix.view(torch.float32)
