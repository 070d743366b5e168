"""SparseGPT's walk over blocks of columns, the same for every backend.

Each backend supplies two functions that work on one block. `w` is fp32 `[out, width]`, a view with rows
`w.stride(0)` apart; `u` is fp32 `[width, width]`, a view of U with rows `u.stride(0)` apart; `pruned` is
bool `[out, width]`, a view too; `root` is the square root of the scale, fp32 `[width]`, or None.

    mark_lowest(w, u, pruned, selector, root, rank)
        Set pruned = (score <= the score at sorted position `rank` of the block). All ties are pruned, as
        published.
    sparsegpt_block(w, u, pruned, selector, root, n, m, errors)
        Go through the columns from left to right. If m is not 0, choose `pruned` for each group of m columns
        at its first column. Zero the pruned weights, subtract their errors from the columns to the right, and
        write `errors`, contiguous fp32 `[out, width]`.

`reference/sparsegpt_block.py` defines the right result, to the bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wanda_kernels.loops.joint_threshold import SumRows, joint_threshold
from wanda_kernels.mask_bits import pack_bits

SELECTORS = ("obs", "wanda", "magnitude")
BLOCK_WIDTH = 128  # as published


def block_width(m: int) -> int:
    """Columns of a block: 128, or as many whole groups of m as fit into 128."""
    return BLOCK_WIDTH // m * m if m else BLOCK_WIDTH


def prune_in_blocks_(
    mark_lowest: Callable[..., None],
    sparsegpt_block: Callable[..., None],
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
    sum_rows: SumRows | None = None,
) -> None:
    """Prune `weight` in place and update the kept weights to the right of every pruned one.

    One of three arguments chooses what to prune: `pruned`, `ratio`, or n:m (0:0 if another one chooses).

    Args:
        sum_rows: as in `joint_threshold`, if other processes hold further rows of the weight.
    """
    n_rows, n_cols = weight.shape
    all_rows = n_rows if sum_rows is None else int(sum_rows(torch.tensor(n_rows)))
    w = weight.float()  # the weight itself where it is fp32
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
            rank = int(all_rows * (end - first) * ratio)
            if sum_rows is None:
                mark_lowest(*operands, selector, block_root, rank)
            else:
                scores = block_scores(w[:, block], operands[1], selector, block_root)
                torch.le(scores, joint_threshold(scores, rank, sum_rows), out=operands[2])
        errors = workspace[: n_rows * (end - first)].view(n_rows, end - first)
        sparsegpt_block(*operands, selector, block_root, n, m, errors)
        w[:, end:].addmm_(errors, upper[block, end:], alpha=-1)
    weight.copy_(w)
    if mask is not None:
        mask.copy_(pack_bits(~pruned))


def block_scores(w: Tensor, u: Tensor, selector: str, root: Tensor | None) -> Tensor:
    """Scores of a block's columns: W^2 / U_jj^2, abs(W) * root or abs(W), fp32 of w's shape."""
    if selector == "obs":
        return w.square() / u.diagonal().square()
    return w.abs() * root if selector == "wanda" else w.abs()
