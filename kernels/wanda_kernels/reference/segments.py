"""The rows of each expert, of tokens sorted by expert."""

from itertools import pairwise

from torch import Tensor


def segments(x: Tensor, offsets: Tensor) -> list[Tensor]:
    """Rows offsets[e] to offsets[e + 1] of x for each expert e; the host waits for a GPU."""
    return [x[first:end] for first, end in pairwise(offsets.tolist())]
