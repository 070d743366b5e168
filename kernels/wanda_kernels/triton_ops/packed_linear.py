"""x weight^T + bias for packed rows. `operations/packed.py` documents the operands.

A program takes a tile of the weight's rows and one row of x, so that the order of a sum does not depend on
the number of rows of x. The programs of the other rows of x find the tile in L2, so DRAM is read once: with
half the weights kept in 16 bits, 1.125 bytes a weight. The roof is copy bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.triton_ops.packed_rows import TILE, expand, first_values


@triton.jit
def _packed_linear_kernel(
    out_ptr,
    x_ptr, x_rows,
    bits_ptr, n_bytes,
    values_ptr, n_values, row_values,
    offsets_ptr, bias_ptr,
    n_rows, n_cols,
    HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one axis: the second one of a grid has at most 65,535 programs
    program = tl.program_id(0).to(tl.int64)
    x_row = program % x_rows
    rows = (program // x_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < n_rows
    first = first_values(offsets_ptr, rows, mask_m, row_values, HAS_OFFSETS)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_col in range(0, n_cols, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)
        inside = mask_m[:, None] & (cols < n_cols)[None, :]
        values, has_value, first = expand(bits_ptr, n_bytes, values_ptr, n_values, rows, cols, inside, first)
        x = tl.load(x_ptr + x_row * n_cols + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        # an infinite x times a pruned weight is no NaN
        sums += tl.where(has_value, values.to(tl.float32) * x[None, :], 0.0)  # [BLOCK_M, BLOCK_N]
    total = tl.sum(sums, axis=1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=mask_m, other=0.0).to(tl.float32)
    tl.store(out_ptr + x_row * n_rows + rows, total.to(out_ptr.dtype.element_ty), mask=mask_m)


def packed_linear(
    x: Tensor, bits: Tensor, values: Tensor, offsets: Tensor | None, bias: Tensor | None
) -> Tensor:
    n_rows, n_cols = len(bits), x.shape[-1]
    out = torch.empty(*x.shape[:-1], n_rows, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    # the programs of one tile run one after the other
    x_rows = x.shape[:-1].numel()
    _packed_linear_kernel[(x_rows * triton.cdiv(n_rows, TILE["BLOCK_M"]),)](
        out, x.contiguous(), x_rows, bits, bits.shape[-1], values, values.numel(), values.shape[-1],
        offsets if offsets is not None else bits, bias if bias is not None else x, n_rows, n_cols,
        HAS_OFFSETS=offsets is not None, HAS_BIAS=bias is not None, **TILE,
    )  # fmt: skip
    return out
