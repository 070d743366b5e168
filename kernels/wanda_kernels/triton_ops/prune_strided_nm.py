"""prune_nm_ where a row's columns are apart in memory, as in transposed storage.

W [E, n_rows, n_cols] in place, of any strides; scale [E, n_cols], [E, n_rows, n_cols] or None. A thread holds
the columns of a group of one row, each from a load of its own, and a warp's lanes are neighbouring rows, so
that every load reads whole sectors. Bytes and roof are those of prune_nm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.mask_bits import pack_bits
from wanda_kernels.triton_ops.nm_groups import kept_of
from wanda_kernels.triton_ops.score_keys import (
    MASK_BITS,
    MASK_BYTES,
    NO_MASK,
    PAD_KEY,
    ROOT_VECTOR,
    SCALE_MATRIX,
    keys_of,
    mask_arguments,
    n_matrices,
    scale_arguments,
    stack_strides,
    tile_of_stack,
)


@triton.jit
def _prune_strided_groups_kernel(
    w_ptr, stride_we, stride_wm, stride_wn,
    scale_ptr, stride_se, stride_sm,
    mask_ptr, stride_mm,
    n_rows, n_cols,
    N_PRUNED: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr,  # GROUP: the power of two at or above M
    GROUPS: tl.constexpr,  # of a thread: whole bytes of the mask
    SCALE: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, THREADS_N: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = BLOCK_M * THREADS_N
    matrix, first_row = tile_of_stack(tl.program_id(0), n_rows, BLOCK_M)
    offs = tl.arange(0, SIZE)
    rows = first_row + offs % BLOCK_M  # [SIZE]
    first_col = (tl.program_id(1) * THREADS_N + offs // BLOCK_M) * (GROUPS * M)
    w_ptr += matrix * stride_we + rows * stride_wm
    scale_ptr += matrix * stride_se + rows * stride_sm
    mask_ptr += (matrix * n_rows + rows) * stride_mm
    packed = tl.zeros((SIZE,), tl.int32)
    for g in tl.static_range(GROUPS):
        inside = (rows < n_rows) & (first_col + g * M < n_cols)
        weights, keys = (), ()
        for j in tl.static_range(M):
            cols = first_col + (g * M + j)
            w = tl.load(w_ptr + cols.to(tl.int64) * stride_wn, mask=inside, other=0.0)
            scale = w
            if SCALE == ROOT_VECTOR or SCALE == SCALE_MATRIX:
                scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)
            weights += (w,)
            keys += (keys_of(w, scale, inside, SCALE),)
        for _ in tl.static_range(GROUP - M):
            keys += (tl.full((SIZE,), PAD_KEY, tl.int32),)
        kept = kept_of(keys, N_PRUNED, GROUP)
        for j in tl.static_range(M):
            cols = first_col + (g * M + j)
            w = tl.where(kept[j], weights[j], 0.0)
            tl.store(w_ptr + cols.to(tl.int64) * stride_wn, w, mask=inside)
            if MASK == MASK_BYTES:
                tl.store(mask_ptr + cols, kept[j].to(tl.uint8), mask=inside)
            if MASK == MASK_BITS:
                packed |= (kept[j] & inside).to(tl.int32) << (g * M + j) % 8
                if (g * M + j) % 8 == 7:
                    is_byte = (rows < n_rows) & (cols - 7 < n_cols)
                    tl.store(mask_ptr + cols // 8, packed.to(tl.uint8), mask=is_byte)
                    packed = tl.zeros((SIZE,), tl.int32)


def _tile(group: int) -> dict[str, int]:
    if group > 8:
        # one group a thread: its weights and keys fill the registers
        return {"BLOCK_M": 32, "THREADS_N": 4, "num_warps": 4}
    return {"BLOCK_M": 64, "THREADS_N": 4, "num_warps": 4}  # two neighbouring rows a thread


def prune_strided_nm_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    n_rows, n_cols = weight.shape[-2:]
    scale, stride_se, stride_sm, kind = scale_arguments(weight, scale)
    group = triton.next_power_of_2(m)
    kept, mask_kind = mask, NO_MASK if mask is None else MASK_BITS
    if mask is not None and m != group:
        # a byte of the mask spans groups: write one byte a weight and pack them afterwards
        kept = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        mask_kind = MASK_BYTES
    packed, stride_mm = mask_arguments(weight, kept)
    groups = max(8 // m, 1) if m == group else 1
    tile = _tile(group)
    columns = tile["THREADS_N"] * groups * m
    grid = (n_matrices(weight) * triton.cdiv(n_rows, tile["BLOCK_M"]), triton.cdiv(n_cols, columns))
    _prune_strided_groups_kernel[grid](
        weight, *stack_strides(weight), weight.stride(-1), scale, stride_se, stride_sm, packed, stride_mm,
        n_rows, n_cols,
        N_PRUNED=m - n, M=m, GROUP=group, GROUPS=groups, SCALE=kind, MASK=mask_kind.value, **tile,
        enable_fp_fusion=False,
    )  # fmt: skip
    if kept is not mask:
        mask.copy_(pack_bits(kept))
