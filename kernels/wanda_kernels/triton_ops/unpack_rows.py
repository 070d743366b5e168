"""Packed rows -> the weight. `operations/packed.py` documents the operands.

A program takes a tile of rows from left to right. Values are copied as integers, which keep every bit. The
bits and values are read, and every element is written, once. The roof is copy bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.mask_bits import as_integers
from wanda_kernels.triton_ops.packed_rows import TILE, expand, first_values


@triton.jit
def _unpack_rows_kernel(
    out_ptr,
    bits_ptr, n_bytes,
    values_ptr, n_values, row_values,
    offsets_ptr,
    n_rows, n_cols,
    HAS_OFFSETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < n_rows
    first = first_values(offsets_ptr, rows, mask_m, row_values, HAS_OFFSETS)
    for first_col in range(0, n_cols, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)
        inside = mask_m[:, None] & (cols < n_cols)[None, :]
        values, _, first = expand(bits_ptr, n_bytes, values_ptr, n_values, rows, cols, inside, first)
        tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], values, mask=inside)


def unpack_rows(out: Tensor, bits: Tensor, values: Tensor, offsets: Tensor | None) -> None:
    n_rows, n_cols = out.shape[:-1].numel(), out.shape[-1]
    _unpack_rows_kernel[(triton.cdiv(n_rows, TILE["BLOCK_M"]),)](
        as_integers(out), bits, bits.shape[-1], as_integers(values), values.numel(), values.shape[-1],
        offsets if offsets is not None else bits, n_rows, n_cols, HAS_OFFSETS=offsets is not None, **TILE,
    )  # fmt: skip
