"""prune_rows_ where a row's columns are apart in memory, as in transposed storage.

W [E, n_rows, n_cols] in place, of any strides; scale [E, n_cols], [E, n_rows, n_cols] or None. A program
takes as many neighbouring rows as fit the registers and searches the thresholds of all of them at once. A
tile is [columns, rows]: a warp's lanes are neighbours in memory. Neighbouring programs share the cache lines
of a column in L2. Bytes and roof are those of prune_rows.py, where the search is explained.
"""

import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.triton_ops.row_search import NO_SIDE, narrow, next_guess
from wanda_kernels.triton_ops.score_keys import (
    PAD_KEY,
    load_keys,
    mask_arguments,
    n_matrices,
    scale_arguments,
    stack_strides,
    tile_of_stack,
)


@triton.jit
def _searching(low, high, below, wanted):
    return (high - low > 1) & (below != wanted)


@triton.jit
def _search_on(low, high, below, missing, surplus, side, guess, count, wanted):
    """`narrow` for the rows that are not finished."""
    searching = _searching(low, high, below, wanted)
    new = narrow(low, high, below, missing, surplus, side, guess, count, wanted)
    low, high = tl.where(searching, new[0], low), tl.where(searching, new[1], high)
    below = tl.where(searching, new[2], below)
    return low, high, below, new[3], new[4], new[5]


# A stride that is known to be 1 would give a thread vectors of rows, and as many brackets in registers.
@triton.jit(do_not_specialize=["num_pruned", "stride_wm", "stride_sn"])
def _prune_strided_rows_kernel(
    w_ptr, stride_we, stride_wm, stride_wn,
    scale_ptr, stride_se, stride_sm, stride_sn,
    mask_ptr, stride_mm,
    n_rows, n_cols, num_pruned,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    matrix, first_row = tile_of_stack(tl.program_id(0), n_rows, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)[None, :]  # [1, BLOCK_M]
    cols = tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    inside = (rows < n_rows) & (cols < n_cols)
    w_ptr += matrix * stride_we
    w_ptrs = w_ptr + rows * stride_wm + cols.to(tl.int64) * stride_wn
    scale_ptrs = scale_ptr + matrix * stride_se + rows * stride_sm + cols * stride_sn
    keys = load_keys(w_ptrs, scale_ptrs, inside, SCALE)  # [BLOCK_N, BLOCK_M]

    # as in prune_rows.py, with a bracket for each row
    high = tl.max(tl.where(keys == PAD_KEY, -1, keys), axis=0) + 1
    low = tl.where(num_pruned == n_cols, high, tl.min(keys, axis=0))
    below = tl.where(num_pruned == n_cols, n_cols, tl.zeros_like(low))
    wanted = tl.zeros_like(low) + num_pruned
    missing, surplus = wanted.to(tl.float32), (n_cols - wanted).to(tl.float32)
    side, n_passes = tl.zeros_like(low) + NO_SIDE, 0
    while tl.max(_searching(low, high, below, wanted).to(tl.int32), axis=0) > 0:
        guess = next_guess(low, high, missing, surplus, n_passes)
        count = tl.sum((keys < guess[None, :]).to(tl.int32), axis=0)
        low, high, below, missing, surplus, side = _search_on(
            low, high, below, missing, surplus, side, guess, count, wanted
        )
        n_passes += 1

    ties = wanted - below
    tie_low, tie_high, tie_below = tl.zeros_like(low), tl.zeros_like(low) + n_cols, tl.zeros_like(low)
    missing, side, n_passes = tl.maximum(ties, 1).to(tl.float32), tl.zeros_like(low) + NO_SIDE, 0
    surplus = missing
    while tl.max(_searching(tie_low, tie_high, tie_below, ties).to(tl.int32), axis=0) > 0:
        guess = next_guess(tie_low, tie_high, missing, surplus, n_passes)
        count = tl.sum(((keys == low[None, :]) & (cols < guess[None, :])).to(tl.int32), axis=0)
        tie_low, tie_high, tie_below, missing, surplus, side = _search_on(
            tie_low, tie_high, tie_below, missing, surplus, side, guess, count, ties
        )
        n_passes += 1

    kept = (keys > low[None, :]) | ((keys == low[None, :]) & (cols >= tie_low[None, :]))
    # From L2, by addresses computed again: holding either through the passes would take registers. The
    # compiler would hold the addresses if it knew that no column is negative.
    stride_wn += tl.minimum(tl.min(tie_low, axis=0), 0)
    w_ptrs = w_ptr + rows * stride_wm + cols.to(tl.int64) * stride_wn
    w = tl.load(w_ptrs, mask=inside)
    tl.store(w_ptrs, tl.where(kept, w, 0.0), mask=inside)
    if HAS_MASK:
        bits = tl.reshape((kept & inside).to(tl.int32), (BLOCK_N // 8, 8, BLOCK_M))
        packed = tl.sum(bits << tl.arange(0, 8)[None, :, None], axis=1).to(tl.uint8)
        offs = tl.arange(0, BLOCK_N // 8)[:, None]
        mask_ptrs = mask_ptr + (matrix * n_rows + rows) * stride_mm + offs
        tl.store(mask_ptrs, packed, mask=(rows < n_rows) & (offs < tl.cdiv(n_cols, 8)))


MOST_COLUMNS = KEYS = 8192  # of a program: 16 keys a thread of 16 warps; 32 keys spill
MOST_ROWS = 16  # 32 bytes of a 16-bit column: a sector


def _tile(n_cols: int) -> dict[str, int]:
    block_n = max(triton.next_power_of_2(n_cols), 128)
    block_m = min(KEYS // block_n, MOST_ROWS)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": max(block_m * block_n // 512, 1)}


def prune_strided_rows_(weight: Tensor, scale: Tensor | None, num_pruned: int, mask: Tensor | None) -> None:
    """For rows of at most MOST_COLUMNS."""
    n_rows, n_cols = weight.shape[-2:]
    scale, stride_se, stride_sm, kind = scale_arguments(weight, scale)
    packed, stride_mm = mask_arguments(weight, mask)
    tile = _tile(n_cols)
    _prune_strided_rows_kernel[(n_matrices(weight) * triton.cdiv(n_rows, tile["BLOCK_M"]),)](
        weight, *stack_strides(weight), weight.stride(-1), scale, stride_se, stride_sm, 1, packed, stride_mm,
        n_rows, n_cols, num_pruned,
        SCALE=kind, HAS_MASK=mask is not None, **tile, enable_fp_fusion=False,
    )  # fmt: skip
