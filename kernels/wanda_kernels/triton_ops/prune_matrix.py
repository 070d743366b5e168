"""Zero every score at most the one at sorted position `rank` of the whole matrix; all ties are pruned.

W [n_rows, n_cols] in place; scale [n_cols], [n_rows, n_cols] or None. Exact histograms of the keys give the
threshold digit by digit, then one pass writes. A 16-bit magnitude has 15 bits, two digits: 8 bytes a weight.
One histogram of all 32,768 values would read and write 6 bytes a weight, but needs more shared memory than
Triton can use. 31-bit keys take three digits. The roof is copy bandwidth. Counts are integers and the rank
stays on the device: the same bits on every run, and nothing waits for the host.
Source: radix select; the magnitude baseline of Wanda's published code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.triton_ops.score_keys import (
    RAW_BITS,
    load_keys,
    mask_arguments,
    nan_key,
    pack_mask,
    scale_arguments,
)


@triton.jit
def _count_digits_kernel(
    w_ptr, stride_wm,
    scale_ptr, stride_sm,
    state_ptr,  # int64 [2]: the digits known so far, the rank among the keys that begin with them
    counts_ptr,  # int64 [1 << BITS]
    n_rows, n_cols, tiles_per_row, n_tiles,
    SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    counts = tl.zeros((1 << BITS,), tl.int32)
    offs = tl.arange(0, BLOCK_M * BLOCK_N)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        rows = (tile // tiles_per_row).to(tl.int64) * BLOCK_M + offs // BLOCK_N
        cols = tile % tiles_per_row * BLOCK_N + offs % BLOCK_N
        inside = (rows < n_rows) & (cols < n_cols)
        w_ptrs, scale_ptrs = w_ptr + rows * stride_wm + cols, scale_ptr + rows * stride_sm + cols
        keys = load_keys(w_ptrs, scale_ptrs, inside, SCALE)  # [BLOCK_M * BLOCK_N]
        if not FIRST:
            inside &= (keys >> (SHIFT + BITS)) == tl.load(state_ptr).to(tl.int32)
        counts += tl.histogram((keys >> SHIFT) & ((1 << BITS) - 1), 1 << BITS, mask=inside)
    bins = tl.arange(0, 1 << BITS)
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["rank"])
def _choose_digit_kernel(
    state_ptr,
    counts_ptr,
    rank,
    BITS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    known = tl.zeros((), tl.int64)
    left = rank.to(tl.int64)
    if not FIRST:
        known, left = tl.load(state_ptr), tl.load(state_ptr + 1)
    bins = tl.arange(0, 1 << BITS)
    counts = tl.load(counts_ptr + bins)
    digit = tl.sum((tl.cumsum(counts) <= left).to(tl.int32))  # bins that end before the rank
    left -= tl.sum(tl.where(bins < digit, counts, 0))
    tl.debug_barrier()  # every thread has read the state
    tl.store(state_ptr, known << BITS | digit)
    tl.store(state_ptr + 1, left)


@triton.jit
def _prune_up_to_kernel(
    w_ptr, stride_wm,
    scale_ptr, stride_sm,
    mask_ptr, stride_mm,
    threshold_ptr,  # the highest key to prune
    n_cols,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n_cols
    w_ptrs = w_ptr + row * stride_wm + offs
    keys = load_keys(w_ptrs, scale_ptr + row * stride_sm + offs, inside, SCALE)  # [BLOCK]
    threshold = tl.load(threshold_ptr).to(tl.int32)
    kept = (keys > threshold) | (threshold == nan_key(w_ptr.dtype.element_ty, SCALE))  # no score is <= NaN
    tl.store(w_ptrs, tl.where(kept, tl.load(w_ptrs, mask=inside), 0.0), mask=inside)
    if HAS_MASK:
        offs = tl.program_id(1) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        mask_ptrs = mask_ptr + row * stride_mm + offs
        tl.store(mask_ptrs, pack_mask(kept & inside, BLOCK), mask=offs < tl.cdiv(n_cols, 8))


# bits of a key -> bits of its digits, highest first; 256 bins are 8 counters a lane of a warp, 2048 are 64
DIGITS = {15: (8, 7), 31: (10, 10, 11)}
MOST_PROGRAMS = 1056  # 8 for each of an H200's 132 multiprocessors; each adds its counts to the total once
TILE = 2048  # weights that a program counts at a time: 2048 of one row, or 128 of each of 16 short rows


def ranked_key(weight: Tensor, scale: Tensor, stride_sm: int, kind: int, rank: int) -> Tensor:
    """int64 [2]; the first element is the key at sorted position `rank` of the whole matrix.

    scale, stride_sm, kind: from `scale_arguments`.
    """
    n_rows, n_cols = weight.shape
    digits = DIGITS[15 if kind == RAW_BITS.value else 31]
    block_n = TILE if n_cols >= TILE else 128
    tiles_per_row = triton.cdiv(n_cols, block_n)
    n_tiles = triton.cdiv(n_rows, TILE // block_n) * tiles_per_row
    state = torch.empty(2, dtype=torch.int64, device=weight.device)
    counts = torch.zeros(len(digits), 1 << max(digits), dtype=torch.int64, device=weight.device)
    shift = sum(digits)
    for place, bits in enumerate(digits):
        shift -= bits
        flags = {"BITS": bits, "FIRST": place == 0}
        # short rows need a pointer and a mask for every few weights, hence more warps
        num_warps = 4 if block_n == TILE else 8
        _count_digits_kernel[(min(n_tiles, MOST_PROGRAMS),)](
            weight, weight.stride(0), scale, stride_sm, state, counts[place],
            n_rows, n_cols, tiles_per_row, n_tiles,
            **flags, SHIFT=shift, SCALE=kind, BLOCK_M=TILE // block_n, BLOCK_N=block_n,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        _choose_digit_kernel[(1,)](state, counts[place], rank, **flags, num_warps=4)
    return state


def prune_matrix_(weight: Tensor, scale: Tensor | None, rank: int, mask: Tensor | None) -> None:
    n_rows, n_cols = weight.shape
    scale, _, stride_sm, kind = scale_arguments(weight, scale)
    packed, stride_mm = mask_arguments(weight, mask)
    threshold = ranked_key(weight, scale, stride_sm, kind, rank)
    _prune_up_to_kernel[(n_rows, triton.cdiv(n_cols, 1024))](
        weight, weight.stride(0), scale, stride_sm, packed, stride_mm, threshold, n_cols,
        SCALE=kind, HAS_MASK=mask is not None, BLOCK=1024, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
