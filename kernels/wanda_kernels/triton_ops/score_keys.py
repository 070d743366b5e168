"""Shared by the selection kernels: scores as integer keys with the same order, and packed mask bits.

A score abs(W) * sqrt(scale) is one correctly rounded fp32 product and never negative, so its bits, read as an
integer, have the same order as the score. -0.0 equals 0.0, and all NaNs become one key above infinity's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_SCALE = tl.constexpr(0)
ROOT_VECTOR = tl.constexpr(1)  # sqrt(scale), one row a matrix, computed once by torch
SCALE_MATRIX = tl.constexpr(2)  # scale itself, of the weight's shape; the kernel computes its roots
RAW_BITS = tl.constexpr(3)  # no scale, and a 16-bit weight: its own bits are the key, half as many to search
SQUARE_OVER_VECTOR = tl.constexpr(4)  # SparseGPT's score, W^2 / scale with scale [in], in fp32

NO_MASK, MASK_BITS, MASK_BYTES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

PAD_KEY = tl.constexpr(0x7FFFFFFF)  # above every key: padding is never counted and never pruned


@triton.jit
def exact_float(w):
    """w in fp32; bf16 is widened by its bits, because the interpreter's cast loses bf16's subnormals."""
    if w.dtype == tl.bfloat16:
        wide = (w.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = w.to(tl.float32)
    return wide


@triton.jit
def nan_key(dtype: tl.constexpr, SCALE: tl.constexpr):
    """The key of every NaN for weights of a dtype: above all other keys."""
    if SCALE != RAW_BITS:
        key = 0x7F800001
    elif dtype == tl.float16:
        key = 0x7C01
    else:
        key = 0x7F81
    return key


@triton.jit
def keys_of(w, scale, inside, SCALE: tl.constexpr):
    """int32 keys of weights `w` with the loaded `scale`; PAD_KEY where not inside."""
    if SCALE == RAW_BITS:
        magnitude = w.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    else:
        score = tl.abs(exact_float(w))
        if SCALE == SQUARE_OVER_VECTOR:
            score = tl.div_rn(score * score, scale)
        if SCALE == ROOT_VECTOR:
            score = score * scale
        if SCALE == SCALE_MATRIX:
            score = score * tl.sqrt_rn(scale)
        magnitude = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(inside, tl.minimum(magnitude, nan_key(w.dtype, SCALE)), PAD_KEY)


@triton.jit
def load_keys(w_ptrs, scale_ptrs, inside, SCALE: tl.constexpr):
    w = tl.load(w_ptrs, mask=inside, other=0.0)
    scale = w
    if SCALE == ROOT_VECTOR or SCALE == SCALE_MATRIX or SCALE == SQUARE_OVER_VECTOR:
        scale = tl.load(scale_ptrs, mask=inside, other=1.0)
    return keys_of(w, scale, inside, SCALE)


@triton.jit
def highest_key(keys):
    return tl.max(tl.where(keys == PAD_KEY, -1, keys))


@triton.jit
def pack_mask(kept, SIZE: tl.constexpr):
    """uint8 [SIZE // 8] of kept's SIZE elements in order, little-endian."""
    bits = tl.reshape(kept.to(tl.int32), (SIZE // 8, 8)) << tl.arange(0, 8)[None, :]
    return tl.sum(bits, axis=1).to(tl.uint8)


@triton.jit
def row_of_stack(ptr, row, n_rows, stride_e, stride_m):
    """The first element of a row, numbered through all matrices of n_rows."""
    return ptr + (row // n_rows).to(tl.int64) * stride_e + (row % n_rows).to(tl.int64) * stride_m


@triton.jit
def tile_of_stack(tile, n_rows, BLOCK_M: tl.constexpr):
    """(matrix, first row) of a tile of BLOCK_M rows, numbered through all matrices."""
    tiles = tl.cdiv(n_rows, BLOCK_M)
    return (tile // tiles).to(tl.int64), (tile % tiles).to(tl.int64) * BLOCK_M


def stack_strides(weight: Tensor) -> tuple[int, int]:
    """Strides from matrix to matrix and from row to row; one matrix is a stack of one."""
    return (weight.stride(0) if weight.dim() == 3 else 0), weight.stride(-2)


def n_matrices(weight: Tensor) -> int:
    return weight.shape[0] if weight.dim() == 3 else 1


def scale_arguments(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, int, int, int]:
    """(tensor, matrix stride, row stride, kind) to pass to a selection kernel for `scale`."""
    if scale is None:
        kind = NO_SCALE if weight.dtype == torch.float32 else RAW_BITS
        return weight, 0, 0, kind.value  # never read
    if scale.dim() < weight.dim():
        return scale.sqrt().contiguous(), weight.shape[-1], 0, ROOT_VECTOR.value
    if scale.stride(-1) != 1:
        scale = scale.contiguous()
    return scale, *stack_strides(scale), SCALE_MATRIX.value


def mask_arguments(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """(tensor, row stride) to pass for the packed mask; without a mask, the weight, which is not written."""
    return (weight, 0) if mask is None else (mask, mask.stride(-2))
