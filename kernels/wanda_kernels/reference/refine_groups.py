"""The best mask of each group of m columns, all candidates tried; every product and sum is rounded.

The error of a candidate, as far as it depends on the group, is the sum over its pruned columns, ascending, of

    a_i = (2 w_i) c'_i + (w_i w_i) h_ii    and, for each earlier pruned column j,    ((2 w_j) w_i) h_ji,

where c' is c without the group's own weights. `mask_descent.py` documents the arguments.
"""

import torch
from torch import Tensor

from wanda_kernels.loops.mask_descent import candidates_of


def refine_groups(w: Tensor, pruned: Tensor, c: Tensor, h: Tensor, n: int, m: int) -> None:
    for first in range(0, w.shape[1], m):
        _refine_group(w, pruned, c, h, first, n, m)


def _refine_group(w: Tensor, pruned: Tensor, c: Tensor, h: Tensor, first: int, n: int, m: int) -> None:
    group = slice(first, first + m)
    w_group, h_group = w[:, group], h[group, group]
    removed = torch.where(pruned[:, group], w_group, 0.0)
    others = c[:, group].clone()  # c'
    for i in range(m):
        others -= removed[:, i : i + 1] * h_group[i]
    twice = 2 * w_group
    alone = twice * others + (w_group * w_group) * h_group.diagonal()  # a

    masks = torch.zeros(len(candidates_of(n, m)), m, dtype=torch.bool, device=w.device)
    for mask, columns in zip(masks, candidates_of(n, m), strict=True):
        mask[list(columns)] = True
    now = pruned[:, group].clone()
    lowest = _error(alone, twice, w_group, h_group, now)
    for mask in masks:
        error = _error(alone, twice, w_group, h_group, mask.expand_as(now))
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        now = torch.where(better[:, None], mask, now)
    pruned[:, group] = now
    added = torch.where(now, w_group, 0.0) - removed
    for i in range(m):
        c[:, first + m :] += added[:, i : i + 1] * h[first + i, first + m :]


def _error(alone: Tensor, twice: Tensor, w: Tensor, h: Tensor, pruned: Tensor) -> Tensor:
    """The error of a mask, fp32 `[out]`; pruned bool `[out, m]`."""
    total = torch.zeros_like(alone[:, 0])
    for i in range(w.shape[1]):
        total = total + torch.where(pruned[:, i], alone[:, i], 0.0)
        for j in range(i):
            pair = (twice[:, j] * w[:, i]) * h[j, i]
            total = total + torch.where(pruned[:, i] & pruned[:, j], pair, 0.0)
    return total
