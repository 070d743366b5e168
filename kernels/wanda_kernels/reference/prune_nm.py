"""Keep the n highest scores of every m consecutive columns; ties prune the lower column first."""

import torch
from torch import Tensor

from wanda_kernels.reference.scores import score, zero_


def prune_nm_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    zero_(weight, lowest_of_groups(score(weight, scale), n, m), mask)


def lowest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool of the scores' shape: True for all but the n highest of every m columns."""
    groups = scores.reshape(-1, m)  # [weights / m, m]
    lowest = groups.sort(dim=1, stable=True).indices[:, : m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).view(scores.shape)
