"""The best swaps of a kept and a pruned weight in each group of m columns; every product and sum is rounded.

A swap of the kept column u and the pruned column p changes the row's error by

    (prune_u + keep_p) - ((2 w_u) w_p) h_up,
    prune_u = (2 w_u) c_u + (w_u w_u) h_uu,    keep_p = (w_p w_p) h_pp - (2 w_p) c_p.

Then c_j becomes (c_j + w_u h_uj) - w_p h_pj. `mask_descent.py` documents the arguments.
Source: the swaps are those of SparseSwaps, arXiv 2512.10922.
"""

import torch
from torch import Tensor


def refine_swaps(w: Tensor, pruned: Tensor, c: Tensor, h: Tensor, m: int) -> None:
    for first in range(0, w.shape[1], m):
        group = slice(first, min(first + m, w.shape[1]))
        for _ in range(m):
            if not _swap(w, pruned, c, h, group):
                break


def _swap(w: Tensor, pruned: Tensor, c: Tensor, h: Tensor, group: slice) -> bool:
    """Make the best swap of every row that lowers its error. Returns whether there was one."""
    w_group, pruned_group, h_group = w[:, group], pruned[:, group], h[group, group]
    twice, square = 2 * w_group, (w_group * w_group) * h_group.diagonal()
    linear = twice * c[:, group]
    prune = torch.where(pruned_group, torch.inf, linear + square)
    keep = torch.where(pruned_group, square - linear, torch.inf)
    pairs = (twice[:, :, None] * w_group[:, None, :]) * h_group
    changes = (prune[:, :, None] + keep[:, None, :]) - pairs  # [out, u, p]
    # The first of equal changes: `min` promises no order, so the position is looked for.
    lowest = changes.flatten(1).min(dim=1).values
    is_lowest = changes.flatten(1) == lowest[:, None]
    positions = is_lowest.to(torch.uint8).argmax(dim=1)
    rows = (lowest < 0).nonzero()[:, 0]
    u, p = positions[rows] // w_group.shape[1], positions[rows] % w_group.shape[1]
    pruned_group[rows, u], pruned_group[rows, p] = True, False
    gained, lost = w_group[rows, u][:, None] * h[group][u], w_group[rows, p][:, None] * h[group][p]
    c[rows] = (c[rows] + gained) - lost
    return len(rows) > 0
