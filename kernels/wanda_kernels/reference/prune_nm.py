"""Keep the n highest scores of every m consecutive columns; ties prune the lower column first."""

import torch
from torch import Tensor

from wanda_kernels.reference.scores import score, zero_


def prune_nm_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    groups = score(weight, scale).reshape(-1, m)  # [weights / m, m]
    lowest = groups.sort(dim=1, stable=True).indices[:, : m - n]
    pruned = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True)
    zero_(weight, pruned.view(weight.shape), mask)
