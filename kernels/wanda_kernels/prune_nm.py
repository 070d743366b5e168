"""Keep the n highest scores of every m consecutive columns; of equal scores the lower column goes first.

W [n_rows, n_cols] in place, n_cols a multiple of m; scale [n_cols], [n_rows, n_cols] or None. Reads W once
and writes it once: 4 bytes a 16-bit weight, and 4 more with a scale matrix; the roof is copy bandwidth. A
program takes several rows of its columns, so that a scale vector is read once for all of them.
Where a group lies within one thread's 16-byte load (m up to 8 in 16 bits) a weight's rank comes from
comparing every pair, in registers; else the m - n lowest (or n highest) are taken one by one, as 64-bit
minima of (key, column).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.reference import pack_bits
from wanda_kernels.score_keys import (
    ROOT_VECTOR,
    SCALE_MATRIX,
    keys_of,
    mask_arguments,
    pack_mask,
    scale_arguments,
)

NO_MASK, MASK_BITS, MASK_BYTES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _split_columns(x, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """x [SIZE] as a tuple of its GROUP columns, each [SIZE // GROUP]."""
    even, odd = tl.split(tl.reshape(x, (SIZE // 2, 2)))
    if GROUP == 2:
        columns = (even, odd)
    else:
        e = _split_columns(even, SIZE // 2, GROUP // 2)
        o = _split_columns(odd, SIZE // 2, GROUP // 2)
        if GROUP == 4:
            columns = (e[0], o[0], e[1], o[1])
        else:
            columns = (e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3])
    return columns


@triton.jit
def _join_columns(c, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """The inverse of _split_columns."""
    if GROUP == 2:
        even, odd = c[0], c[1]
    elif GROUP == 4:
        even = _join_columns((c[0], c[2]), SIZE // 2, 2)
        odd = _join_columns((c[1], c[3]), SIZE // 2, 2)
    else:
        even = _join_columns((c[0], c[2], c[4], c[6]), SIZE // 2, 4)
        odd = _join_columns((c[1], c[3], c[5], c[7]), SIZE // 2, 4)
    return tl.reshape(tl.join(even, odd), (SIZE,))


@triton.jit
def _kept_by_rank(keys, N_PRUNED: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr):
    columns = _split_columns(keys, SIZE, GROUP)
    kept = ()
    for j in tl.static_range(GROUP):
        rank = tl.zeros((SIZE // GROUP,), tl.int32)  # how many of the group go before column j
        for i in tl.static_range(GROUP):
            if i < j:
                rank += (columns[i] <= columns[j]).to(tl.int32)
            if i > j:
                rank += (columns[i] < columns[j]).to(tl.int32)
        kept += ((rank >= N_PRUNED).to(tl.int32),)
    return _join_columns(kept, SIZE, GROUP) != 0


@triton.jit
def _kept_by_extraction(
    keys, N_PRUNED: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr
):
    column = tl.arange(0, GROUP)[None, :]
    place = tl.reshape(keys, (SIZE // GROUP, GROUP)).to(tl.int64) << 6 | column  # distinct within a group
    if N_PRUNED <= M // 2:
        kept = place >= 0
        for _ in tl.static_range(N_PRUNED):
            lowest = tl.min(place, axis=1)[:, None]
            kept &= place != lowest
            place = tl.where(place == lowest, 1 << 62, place)
    else:
        place = tl.where(column < M, place, -1)
        kept = place < -1
        for _ in tl.static_range(M - N_PRUNED):
            highest = tl.max(place, axis=1)[:, None]
            kept |= place == highest
            place = tl.where(place == highest, -1, place)
    return tl.reshape(kept, (SIZE,))


@triton.jit
def _prune_nm_kernel(
    w_ptr, stride_wm,
    scale_ptr, stride_sm,
    mask_ptr, stride_mm,
    n_rows, n_cols,
    N_PRUNED: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr,  # GROUP: m, or the power of two above it
    SCALE: tl.constexpr, MASK: tl.constexpr, BY_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    first_col = tl.program_id(1) * (BLOCK_N // GROUP * M)
    slots = tl.arange(0, BLOCK_N)[None, :]
    if GROUP == M:
        cols = first_col + slots  # [1, BLOCK_N]
        inside = (rows < n_rows) & (cols < n_cols)
    else:
        cols = first_col + slots // GROUP * M + slots % GROUP
        inside = (rows < n_rows) & (cols < n_cols) & (slots % GROUP < M)

    w_ptrs = w_ptr + rows * stride_wm + cols
    w = tl.load(w_ptrs, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_N]
    scale = w
    if SCALE == ROOT_VECTOR or SCALE == SCALE_MATRIX:
        # a vector's row stride is 0: loaded in its own shape, it would change layout through shared memory
        scale = tl.load(scale_ptr + rows * stride_sm + cols, mask=inside, other=0.0)

    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    keys = tl.reshape(keys_of(w, scale, inside, SCALE), (SIZE,))
    if BY_RANK:
        kept = _kept_by_rank(keys, N_PRUNED, SIZE, GROUP)
    else:
        kept = _kept_by_extraction(keys, N_PRUNED, M, SIZE, GROUP)
    kept = tl.reshape(kept, (BLOCK_M, BLOCK_N))
    tl.store(w_ptrs, tl.where(kept, w, 0.0), mask=inside)

    if MASK == MASK_BYTES:
        tl.store(mask_ptr + rows * stride_mm + cols, kept.to(tl.uint8), mask=inside)
    if MASK == MASK_BITS:
        packed = tl.reshape(pack_mask(tl.reshape(kept & inside, (SIZE,)), SIZE), (BLOCK_M, BLOCK_N // 8))
        offs = first_col // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
        mask_ptrs = mask_ptr + rows * stride_mm + offs
        tl.store(mask_ptrs, packed, mask=(rows < n_rows) & (offs < tl.cdiv(n_cols, 8)))


def _block_sizes(by_rank: bool, n_cols: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program."""
    if not by_rank:
        return 1, 512, 4  # 64-bit places: four a thread
    if n_cols <= 512:
        return 8, 128, 2  # short rows: less padding
    return 4, 512, 4  # 16 weights a thread, two 16-byte loads; four rows share a read of the scale


def prune_nm_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    n_rows, n_cols = weight.shape
    scale, stride_sm, kind = scale_arguments(weight, scale)
    group = triton.next_power_of_2(m)
    kept = mask
    if mask is not None and group != m:  # groups cut across bytes: one byte a weight, packed afterwards
        kept = torch.empty_like(weight, dtype=torch.uint8)
    packed, stride_mm = mask_arguments(weight, kept)
    by_rank = group == m and m * weight.element_size() <= 16  # a group is within one thread's load
    block_m, block_n, num_warps = _block_sizes(by_rank, n_cols)
    # rows first: the other dimensions of a grid end at 65,535
    grid = (triton.cdiv(n_rows, block_m), triton.cdiv(n_cols // m, block_n // group))
    _prune_nm_kernel[grid](
        weight, weight.stride(0), scale, stride_sm, packed, stride_mm, n_rows, n_cols,
        N_PRUNED=m - n, M=m, GROUP=group, SCALE=kind,
        MASK=NO_MASK.value if mask is None else MASK_BITS.value if group == m else MASK_BYTES.value,
        BY_RANK=by_rank, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    if kept is not mask:
        mask.copy_(pack_bits(kept))
