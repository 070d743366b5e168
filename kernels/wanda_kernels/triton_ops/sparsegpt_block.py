"""SparseGPT's inner block: choose what to prune and subtract each error from the columns to its right.

W fp32 [n_rows, n_cols <= 128] in place, U fp32 [n_cols, n_cols] upper triangular, errors fp32 [n_rows,
n_cols]. Rows are independent: a program is one warp that holds BLOCK_M rows in registers, 4 columns a lane,
so that lanes exchange one warp-wide sum a column and nothing else. It reads 5 bytes a weight and writes 8, or
9 if it also chooses. The bound is the chain of n_cols steps, each a sum over the warp, a division, a product
and a subtraction. No fused multiply-add: the bits are the reference's.
Source: Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.loops.joint_threshold import SumRows
from wanda_kernels.loops.sparsegpt import BLOCK_WIDTH, prune_in_blocks_
from wanda_kernels.triton_ops.grouped_product import INTERPRETED
from wanda_kernels.triton_ops.prune_matrix import ranked_key
from wanda_kernels.triton_ops.score_keys import (
    NO_SCALE,
    PAD_KEY,
    ROOT_VECTOR,
    SQUARE_OVER_VECTOR,
    keys_of,
    nan_key,
)


@triton.jit
def _load_scale(scale_ptr, cols, n_cols, SCALE: tl.constexpr):
    return tl.load(scale_ptr + cols, mask=cols < n_cols, other=1.0) if SCALE != NO_SCALE else 1.0


@triton.jit
def _mark_up_to_key_kernel(
    w_ptr, stride_wm,
    scale_ptr,
    pruned_ptr, stride_pm,
    key_ptr,  # int64, the highest key to prune
    n_rows, n_cols,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    cols = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    inside = (rows < n_rows) & (cols < n_cols)
    w = tl.load(w_ptr + rows * stride_wm + cols, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_N]
    keys = keys_of(w, _load_scale(scale_ptr, cols, n_cols, SCALE), inside, SCALE)
    key = tl.load(key_ptr).to(tl.int32)
    pruned = (keys <= key) & (key != nan_key(tl.float32, SCALE))  # no score is <= NaN
    tl.store(pruned_ptr + rows * stride_pm + cols, pruned.to(tl.uint8), mask=inside)


@triton.jit
def _lowest(keys, cols, n_pruned):
    """A mask of the n_pruned lowest keys of each row; of equal keys the lower column."""
    pruned = keys < 0  # none
    for _ in range(n_pruned):
        lowest = tl.min(keys, axis=1)[:, None]
        column = tl.min(tl.where(keys == lowest, cols, 128), axis=1)[:, None]
        pruned |= cols == column
        keys = tl.where(cols == column, PAD_KEY, keys)
    return pruned


@triton.jit(do_not_specialize=["n_pruned", "m"])
def _sparsegpt_block_kernel(
    w_ptr, stride_wm,
    u_ptr, stride_um,
    scale_ptr,
    pruned_ptr, stride_pm,  # uint8, written where CHOOSE, else read
    errors_ptr, stride_em,
    n_rows, n_cols, n_pruned, m,
    CHOOSE: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # stands for a kept weight: a signalling NaN, which no arithmetic produces
    KEPT: tl.constexpr = 0x7F800001
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    cols = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    inside = (rows < n_rows) & (cols < n_cols)
    w_ptrs, pruned_ptrs = w_ptr + rows * stride_wm + cols, pruned_ptr + rows * stride_pm + cols
    w = tl.load(w_ptrs, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_N]
    if CHOOSE:
        scale = _load_scale(scale_ptr, cols, n_cols, SCALE)
        pruned = inside & (cols < 0)  # none yet
    else:
        pruned = tl.load(pruned_ptrs, mask=inside, other=0) != 0

    for i in range(n_cols):
        if CHOOSE:
            if i % m == 0:
                keys = keys_of(w, scale, inside & (cols >= i) & (cols < i + m), SCALE)
                pruned |= _lowest(keys, cols, n_pruned)
        # an integer sum extracts the column's bits exactly, -0.0 too. A kept weight divides 1, because 0
        # would take the division's slow path
        lost = tl.where(pruned, w.to(tl.int32, bitcast=True), KEPT)
        lost = tl.sum(tl.where(cols == i, lost, 0), axis=1)[:, None]  # [BLOCK_M, 1]
        dividend = tl.where(lost == KEPT, 1.0, lost.to(tl.float32, bitcast=True))
        error = tl.div_rn(dividend, tl.load(u_ptr + i * stride_um + i))
        error = tl.where(lost == KEPT, 0.0, error)
        u = tl.load(u_ptr + i * stride_um + cols, mask=cols < n_cols, other=0.0)  # [1, BLOCK_N]
        w = tl.where(cols > i, w - error * u, w)

    # a column's weight does not change after its own step, so one division gives all errors again
    diagonal = tl.load(u_ptr + cols * (stride_um + 1), mask=cols < n_cols, other=1.0)
    errors = tl.where(pruned, tl.div_rn(w, diagonal), 0.0)
    tl.store(errors_ptr + rows * stride_em + cols, errors, mask=inside)
    tl.store(w_ptrs, tl.where(pruned, 0.0, w), mask=inside)
    if CHOOSE:
        tl.store(pruned_ptrs, pruned.to(tl.uint8), mask=inside)


def _block_rows(w: Tensor) -> int:
    if INTERPRETED:
        return 16  # takes no longer than 1
    if w.shape[1] % 16 or w.stride(0) % 16:
        return 2  # weights are loaded one by one, with a pointer and a mask each: 4 rows would spill
    return 4  # 90 registers, and a thousand warps for 4096 rows; 8 rows would spill if n:m is chosen


def _score_arguments(w: Tensor, u: Tensor, selector: str, root: Tensor | None) -> tuple[Tensor, int]:
    """(vector, kind of scale) from which the keys of `selector` are computed."""
    if selector == "obs":
        return u.diagonal().square(), SQUARE_OVER_VECTOR.value
    return (root, ROOT_VECTOR.value) if selector == "wanda" else (w, NO_SCALE.value)


def mark_lowest(w: Tensor, u: Tensor, pruned: Tensor, selector: str, root: Tensor | None, rank: int) -> None:
    scale, kind = _score_arguments(w, u, selector, root)
    key = ranked_key(w, scale, 0, kind, rank)
    _mark_up_to_key_kernel[(triton.cdiv(w.shape[0], 16),)](
        w, w.stride(0), scale, pruned.view(torch.uint8), pruned.stride(0), key, *w.shape,
        SCALE=kind, BLOCK_M=16, BLOCK_N=BLOCK_WIDTH, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def sparsegpt_block(
    w: Tensor, u: Tensor, pruned: Tensor, selector: str, root: Tensor | None, n: int, m: int, errors: Tensor
) -> None:
    scale, kind = _score_arguments(w, u, selector, root) if m else (w, NO_SCALE.value)
    block_m = _block_rows(w)
    _sparsegpt_block_kernel[(triton.cdiv(w.shape[0], block_m),)](
        w, w.stride(0), u, u.stride(0), scale, pruned.view(torch.uint8), pruned.stride(0),
        errors, errors.stride(0), *w.shape, m - n, m,
        CHOOSE=m > 0, SCALE=kind, BLOCK_M=block_m, BLOCK_N=BLOCK_WIDTH, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


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
