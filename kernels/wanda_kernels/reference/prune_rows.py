"""Zero the num_pruned lowest scores of each row; ties prune the lower column first."""

import torch
from torch import Tensor

from wanda_kernels.reference.scores import score, zero_


def prune_rows_(weight: Tensor, scale: Tensor | None, num_pruned: int, mask: Tensor | None) -> None:
    lowest = score(weight, scale).sort(dim=-1, stable=True).indices[..., :num_pruned]
    pruned = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, lowest, True)
    zero_(weight, pruned, mask)
