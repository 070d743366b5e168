"""Zero the num_pruned lowest scores of each row; ties prune the lower column first."""

import torch
from torch import Tensor

from wanda_kernels.reference.scores import score, zero_


def prune_rows_(weight: Tensor, scale: Tensor | None, num_pruned: int, mask: Tensor | None) -> None:
    zero_(weight, lowest_of_rows(score(weight, scale), num_pruned), mask)


def lowest_of_rows(scores: Tensor, num_pruned: int) -> Tensor:
    """Bool of the scores' shape: True for the num_pruned lowest of each row."""
    lowest = scores.sort(dim=-1, stable=True).indices[..., :num_pruned]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, lowest, True)
