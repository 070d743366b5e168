"""Zero every score at most the one at sorted position `rank` of the whole matrix; all ties are pruned."""

from torch import Tensor

from wanda_kernels.reference.scores import score, zero_


def prune_matrix_(weight: Tensor, scale: Tensor | None, rank: int, mask: Tensor | None) -> None:
    scores = score(weight, scale)
    threshold = scores.flatten().sort().values[rank]
    zero_(weight, scores <= threshold, mask)
