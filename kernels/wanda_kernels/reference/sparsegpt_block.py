"""A block of SparseGPT's columns in plain torch: one column at a time, all rows at once.

Every product, quotient and difference is rounded on its own (no fused multiply-add); the other backends give
the same bits. `sparsegpt.py` documents the arguments.
Source: Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1, and its published code.
"""

import torch
from torch import Tensor

from wanda_kernels.loops.joint_threshold import SumRows
from wanda_kernels.loops.sparsegpt import block_scores, prune_in_blocks_


def sparsegpt_(
    weight: Tensor,
    upper: Tensor,
    dead: Tensor,
    ratio: float | None,
    n: int,
    m: int,
    selector: str,
    scale: Tensor | None,
    pruned: Tensor | None,
    mask: Tensor | None,
    *sum_rows: SumRows,
) -> None:
    rule = ratio, n, m, selector, scale, pruned, mask
    prune_in_blocks_(mark_lowest, sparsegpt_block, weight, upper, dead, *rule, *sum_rows)


def mark_lowest(w: Tensor, u: Tensor, pruned: Tensor, selector: str, root: Tensor | None, rank: int) -> None:
    scores = block_scores(w, u, selector, root)
    torch.le(scores, scores.flatten().sort().values[rank], out=pruned)


def sparsegpt_block(
    w: Tensor, u: Tensor, pruned: Tensor, selector: str, root: Tensor | None, n: int, m: int, errors: Tensor
) -> None:
    for i in range(w.shape[1]):
        if m and i % m == 0:
            group = slice(i, i + m)
            scores = block_scores(
                w[:, group], u[group, group], selector, None if root is None else root[group]
            )
            lowest = scores.sort(dim=1, stable=True).indices[:, : m - n]
            pruned[:, group] = torch.zeros_like(pruned[:, group]).scatter_(1, lowest, True)
        pruned_here = pruned[:, i]
        errors[:, i] = torch.where(pruned_here, w[:, i] / u[i, i], 0.0)
        w[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
        w[:, i].masked_fill_(pruned_here, 0.0)
