"""SparseGPT's walk over blocks of columns, the same for every backend.

A backend supplies two functions on one block, `w` fp32 `[out, width]` with rows `w.stride(0)` apart and `u`
fp32 `[width, width]`, a view of U with rows `u.stride(0)` apart; `pruned` is bool `[out, width]`, a view too:

    mark_lowest(w, u, pruned, selector, root, rank)
        pruned = scores <= the score at sorted position `rank` of the whole block; ties go too, as published.
    prune_and_update_block(w, u, pruned, selector, root, n, m, errors)
        columns from left to right: where m is not 0, choose `pruned` in each group of m as it is reached;
        zero the pruned weights, spread their errors over the columns to the right, write `errors`,
        contiguous fp32 `[out, width]`.

`reference_sparsegpt.py` says what is right, to the bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wanda_kernels.reference.ops import pack_bits

SELECTORS = ("obs", "wanda", "magnitude")
BLOCK_WIDTH = 128  # as published


def block_width(m: int) -> int:
    """Columns of a block: 128, or as many whole groups of m as fit, so that none lies across two blocks."""
    return BLOCK_WIDTH // m * m if m else BLOCK_WIDTH


def prune_in_blocks_(
    mark_lowest: Callable,
    prune_and_update_block: Callable,
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
) -> None:
    """weight is changed in place: pruned, and what is kept updated for what went.

    Which weights go is said by one of `pruned`, `ratio` and n:m (0:0 where another does).
    """
    n_rows, n_cols = weight.shape
    w = weight.float()  # fp32 weights are worked on where they are
    w.masked_fill_(dead, 0.0)
    root = None if scale is None else scale.sqrt()
    if pruned is None:
        pruned = torch.empty(n_rows, n_cols, dtype=torch.bool, device=weight.device)
    width = block_width(m)
    workspace = torch.empty(n_rows * width, dtype=torch.float32, device=weight.device)
    for first in range(0, n_cols, width):
        end = min(first + width, n_cols)
        block = slice(first, end)
        operands = w[:, block], upper[block, block], pruned[:, block]
        block_root = None if root is None else root[block]
        if ratio is not None:
            rank = int(operands[0].numel() * ratio)
            mark_lowest(*operands, selector, block_root, rank)
        errors = workspace[: n_rows * (end - first)].view(n_rows, end - first)
        prune_and_update_block(*operands, selector, block_root, n, m, errors)
        w[:, end:].addmm_(errors, upper[block, end:], alpha=-1)
    weight.copy_(w)
    if mask is not None:
        mask.copy_(pack_bits(~pruned))
