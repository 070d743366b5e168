"""The best swaps of a kept and a pruned weight in each group of m columns of a block, row by row.

w fp32 [n_rows, n_cols <= 128], pruned uint8 in place, h fp32 [n_cols, n_cols], c fp32 [n_rows, n_cols], which
becomes workspace. `reference/refine_swaps.py` has the formulas and defines the bits, so there is no fused
multiply-add. A program is one warp that holds a row, 4 columns a lane: the pruned columns p. For a swap it
goes through the kept columns u, with row u of h, which all rows of the block share in L1 and L2; every column
keeps its lowest change and the u that gives it, and one minimum over the warp ends the pass. It reads 9 bytes
a weight and writes 1, and h once a swap: the bound is the arithmetic of the passes, as many as swaps and one
more for each group, of 7 operations a pair of columns.
"""

import triton
import triton.language as tl
from torch import Tensor, uint8

from wanda_kernels.loops.sparsegpt import BLOCK_WIDTH


@triton.jit
def _best_swap(w_ptr, prune_ptr, h_ptr, stride_hm, w, keep, cols, inside, first, end):
    """(change, u, p) of the best swap in columns first..end - 1; of equal ones the lowest u, then p."""
    best, best_u = tl.full(cols.shape, float("inf"), tl.float32), tl.zeros_like(cols)
    for u in range(first, end):
        prune_u = tl.load(prune_ptr + u)
        # infinite where pruned
        if prune_u < float("inf"):
            h = tl.load(h_ptr + u * stride_hm + cols, mask=inside, other=0.0)  # [BLOCK]
            change = (prune_u + keep) - ((2 * tl.load(w_ptr + u)) * w) * h
            better = change < best
            best, best_u = tl.where(better, change, best), tl.where(better, u, best_u)
    lowest = tl.min(best)
    u = tl.min(tl.where(best == lowest, best_u, end - 1))
    p = tl.min(tl.where((best == lowest) & (best_u == u), cols, end - 1))
    return lowest, u, p


@triton.jit
def _removed(w_ptr, h_ptr, stride_hm, column, cols, inside):
    """What the removal of one column adds to c."""
    h = tl.load(h_ptr + column * stride_hm + cols, mask=inside, other=0.0)
    return tl.load(w_ptr + column) * h


@triton.jit(do_not_specialize=["m"])
def _refine_swaps_kernel(
    w_ptr, stride_wm,
    pruned_ptr, stride_pm,
    c_ptr, stride_cm,
    h_ptr, stride_hm,
    n_cols, m,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    w_ptr, c_ptr = w_ptr + row * stride_wm, c_ptr + row * stride_cm
    pruned_ptrs = pruned_ptr + row * stride_pm + cols
    w = tl.load(w_ptr + cols, mask=inside, other=0.0)  # [BLOCK]
    c = tl.load(c_ptr + cols, mask=inside, other=0.0)
    pruned = tl.load(pruned_ptrs, mask=inside, other=0) != 0
    twice = 2 * w
    square = (w * w) * tl.load(h_ptr + cols * (stride_hm + 1), mask=inside, other=0.0)
    first, n_left = 0, m  # of a group: its first column, how many swaps it may still make
    while first < n_cols:
        end = tl.minimum(first + m, n_cols)
        linear = twice * c
        # c is in registers: its memory serves to read single elements
        tl.debug_barrier()
        tl.store(c_ptr + cols, tl.where(pruned, float("inf"), linear + square), mask=inside)
        tl.debug_barrier()
        keep = tl.where(pruned & (cols >= first) & (cols < end), square - linear, float("inf"))
        lowest, u, p = _best_swap(w_ptr, c_ptr, h_ptr, stride_hm, w, keep, cols, inside, first, end)
        lowers = lowest < 0
        gained = _removed(w_ptr, h_ptr, stride_hm, u, cols, inside)
        lost = _removed(w_ptr, h_ptr, stride_hm, p, cols, inside)
        c = tl.where(lowers, (c + gained) - lost, c)
        pruned = tl.where(lowers, (pruned | (cols == u)) & (cols != p), pruned)
        n_left = tl.where(lowers, n_left - 1, 0)
        first = tl.where(n_left == 0, first + m, first)
        n_left = tl.where(n_left == 0, m, n_left)
    tl.store(pruned_ptrs, pruned.to(tl.uint8), mask=inside)


def refine_swaps(w: Tensor, pruned: Tensor, c: Tensor, h: Tensor, m: int) -> None:
    _refine_swaps_kernel[(w.shape[0],)](
        w, w.stride(0), pruned.view(uint8), pruned.stride(0), c, c.stride(0), h, h.stride(0), w.shape[1], m,
        BLOCK=BLOCK_WIDTH, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
