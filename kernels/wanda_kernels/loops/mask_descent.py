"""Mask descent's walk over blocks of columns, the same for every backend.

The error of a row is r H r^T, where r holds the row's pruned weights and 0 elsewhere. A block's columns see
the rest of the row through c = r H, one product a block; within the block each backend changes the mask and
keeps c up to date. Weights do not change.

Each backend supplies two functions. `w` is fp32 `[out, width]`, `pruned` bool `[out, width]`, `h` fp32
`[width, width]`: views with contiguous rows. `c` is contiguous fp32 `[out, width]` and is used up.

    refine_groups(w, pruned, c, h, n, m)
        For each group of m columns, from left to right, take the mask of the lowest error among all that keep
        n. `candidates_of(n, m)` has them in order. A mask must be strictly better than those before it, of
        which the present one is the first.
    refine_swaps(w, pruned, c, h, m)
        For each group of m columns, from left to right, swap the kept weight u and the pruned weight p whose
        swap lowers the error most, until no swap lowers it, at most m times. Of equal swaps the lowest u is
        taken, then the lowest p.

`reference/refine_groups.py` and `reference/refine_swaps.py` define the right result, to the bit.
"""

from collections.abc import Callable
from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from wanda_kernels.loops.sparsegpt import BLOCK_WIDTH, block_width

# Groups with more masks than this, C(8, 4), are refined by swaps.
MOST_CANDIDATES = 70


@cache
def candidates_of(n: int, m: int) -> list[tuple[int, ...]]:
    """The pruned columns of each mask that keeps n of m, in lexicographic order."""
    return list(combinations(range(m), m - n))


def refine_in_blocks_(
    refine_groups: Callable[..., None],
    refine_swaps: Callable[..., None],
    weight: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    n: int,
    m: int,
    sweeps: int,
) -> None:
    """Lower the error of `pruned` in place. n:m: groups keep n of every m columns; 0:0: rows keep as many."""
    w = weight.float().contiguous()
    # A product with the mask takes a tenth of the time of torch.where on a CPU.
    removed = w * pruned  # r
    width = block_width(m)
    for _ in range(sweeps):
        before = pruned.clone()
        for first in range(0, w.shape[1], width):
            block = slice(first, min(first + width, w.shape[1]))
            h = hessian[block, block]
            operands = w[:, block], pruned[:, block], removed @ hessian[:, block], h
            if m and comb(m, n) <= MOST_CANDIDATES:
                refine_groups(*operands, n, m)
            else:
                refine_swaps(*operands, m or BLOCK_WIDTH)
            torch.mul(w[:, block], pruned[:, block], out=removed[:, block])
        if torch.equal(before, pruned):
            return
