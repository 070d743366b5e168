"""A block's forward on a GPU: norm, gated product and rotary embedding in one read and one write each.

The results are those of torch's own operations, except for the order of a norm's sum and the last bits of
exp: they are rounded to the operands' dtype wherever torch's separate operations round. The roof is copy
bandwidth:

- `rms_norm`: x read and written, 4 bytes a 16-bit value; a program holds a whole row.
- `gated_product`: gate and up read, one written, 6 bytes a value.
- `rotary`: x read and written, 4 bytes a value; cosines and sines come from L2.

Inside `saving_column_squares()` the first two also save the column sums of squares of their output, by fixed
slabs of rows, so the bits are the same on every run.

Source: Llama's code in Hugging Face's transformers, where they take 6, 2 and 5 passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels import column_squares
from wanda_kernels.native.forward import turns
from wanda_kernels.native.ops import DTYPES, as_rows
from wanda_kernels.triton_ops.add_coactivation import activate

MOST_COLUMNS = 16384  # of a norm's row, which a program holds in registers
SLAB = 32  # rows whose squares a program sums: the partial sums are small beside the output


@triton.jit
def _rms_norm_kernel(
    out_ptr, stride_om,
    x_ptr, stride_xm,
    weight_ptr,
    partial_ptr,  # fp32 [slabs, n_cols], column sums of out^2 where SLAB is not 0
    n_rows, n_cols, epsilon,
    SLAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * max(SLAB, 1)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + max(SLAB, 1), n_rows)):
        x = tl.load(x_ptr + row * stride_xm + cols, mask=inside, other=0.0).to(tl.float32)
        quotient = x * tl.rsqrt(tl.sum(x * x) / n_cols + epsilon)
        quotient = quotient.to(out_ptr.dtype.element_ty).to(tl.float32)
        out = (weight * quotient).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * stride_om + cols, out, mask=inside)
        if SLAB:
            sums += out.to(tl.float32) * out.to(tl.float32)
    if SLAB:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * n_cols + cols, sums, mask=inside)


@triton.jit
def _gated_product_kernel(
    out_ptr, stride_om,
    gate_ptr, stride_gm,
    up_ptr, stride_um,
    partial_ptr,  # fp32 [slabs, n_cols], column sums of out^2 where SLAB is not 0
    n_rows, n_cols,
    ACTIVATION: tl.constexpr, SLAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * max(SLAB, 1)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + max(SLAB, 1), n_rows)):
        gate = tl.load(gate_ptr + row * stride_gm + cols, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        up = tl.load(up_ptr + row * stride_um + cols, mask=inside, other=0.0).to(tl.float32)
        activated = activate(gate, ACTIVATION).to(out_ptr.dtype.element_ty).to(tl.float32)
        out = (activated * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * stride_om + cols, out, mask=inside)
        if SLAB:
            sums += out.to(tl.float32) * out.to(tl.float32)
    if SLAB:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * n_cols + cols, sums, mask=inside)


@triton.jit
def _rotary_kernel(
    out_ptr, stride_ob, stride_oh, stride_ot,
    x_ptr, stride_xb, stride_xh, stride_xt,
    cos_ptr, sin_ptr, stride_cb, stride_ct,
    n_heads, half,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < n_heads) & (cols < half)  # [BLOCK_H, BLOCK_D]
    dtype = out_ptr.dtype.element_ty

    at = batch * stride_cb + token * stride_ct + cols
    cos_low, cos_high, sin_low, sin_high = (
        tl.load(cos_ptr + at, mask=cols < half, other=0.0).to(tl.float32),
        tl.load(cos_ptr + at + half, mask=cols < half, other=0.0).to(tl.float32),
        tl.load(sin_ptr + at, mask=cols < half, other=0.0).to(tl.float32),
        tl.load(sin_ptr + at + half, mask=cols < half, other=0.0).to(tl.float32),
    )
    x_ptrs = x_ptr + batch * stride_xb + token * stride_xt + heads * stride_xh + cols
    low = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptrs + half, mask=inside, other=0.0).to(tl.float32)
    turned_low = (low * cos_low).to(dtype).to(tl.float32) + (-high * sin_low).to(dtype).to(tl.float32)
    turned_high = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(tl.float32)
    out_ptrs = out_ptr + batch * stride_ob + token * stride_ot + heads * stride_oh + cols
    tl.store(out_ptrs, turned_low.to(dtype), mask=inside)
    tl.store(out_ptrs + half, turned_high.to(dtype), mask=inside)


def takes_rows(*tensors: Tensor) -> bool:
    """Whether `rms_norm` and `gated_product` take these: one dtype, one GPU, at most 16,384 columns."""
    first = tensors[0]
    alike = all(each.dtype == first.dtype and each.device == first.device for each in tensors)
    small = all(each.numel() for each in tensors) and first.shape[-1] <= MOST_COLUMNS
    return alike and small and first.is_cuda and first.dtype in DTYPES


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean of x^2 over features + epsilon)), in fp32.

    The quotient is rounded to x's dtype before it is multiplied by the weight, as in Llama.

    Args:
        x: `[..., features]`, such that `takes_rows(x, weight)`.
        weight: `[features]`.
        epsilon: added to the mean.
    Returns: x's shape and dtype, contiguous.
    """
    rows = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_rows, n_cols = rows.shape
    block = triton.next_power_of_2(n_cols)
    slab, partial = _sums_of(out, n_rows)
    _rms_norm_kernel[(triton.cdiv(n_rows, max(slab, 1)),)](
        out, n_cols, rows, rows.stride(0), weight, partial, n_rows, n_cols, epsilon,
        SLAB=slab, BLOCK=block, num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def gated_product(gate: Tensor, up: Tensor, activation: str | None, out: Tensor | None = None) -> Tensor:
    """act(gate) * up, elementwise; act(gate) is rounded to their dtype first.

    Args:
        gate, up: `[..., features]`, such that `takes_rows(gate, up)`.
        activation: "silu", "gelu", "gelu_tanh", "relu" or None.
        out: gate, up, or another contiguous tensor of their shape and dtype, for the result; None for a new
            one.
    Returns: out.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    into, gate_rows, up_rows = as_rows(out), as_rows(gate), as_rows(up)
    n_rows, n_cols = gate_rows.shape
    block = min(1024, triton.next_power_of_2(max(n_cols, 256)))  # 8 values a thread: two loads of 16 bytes
    slab, partial = _sums_of(out, n_rows)
    _gated_product_kernel[(triton.cdiv(n_rows, max(slab, 1)), triton.cdiv(n_cols, block))](
        into, into.stride(0), gate_rows, gate_rows.stride(0), up_rows, up_rows.stride(0), partial,
        n_rows, n_cols,
        ACTIVATION=activation, SLAB=slab, BLOCK=block, num_warps=block // 256, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _sums_of(out: Tensor, n_rows: int) -> tuple[int, Tensor]:
    """(rows that a program sums, tensor for the sums); (0, any tensor) if no sums are wanted."""
    if not column_squares.are_wanted():
        return 0, out
    partial = torch.empty(triton.cdiv(n_rows, SLAB), out.shape[-1], dtype=torch.float32, device=out.device)
    column_squares.save(out, partial)
    return SLAB, partial


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` takes these tensors: one dtype, one GPU, an even head_dim."""
    return turns(x, cos, sin) and takes_rows(x, cos, sin)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x's upper half, x's lower half) sin, rounded as torch's separate operations round.

    Args:
        x: `[batch, heads, tokens, head_dim]`, such that `rotates(x, cos, sin)`.
        cos, sin: `[batch or 1, tokens, head_dim]`.
    Returns: x's shape and dtype, a view of contiguous `[batch, tokens, heads, head_dim]`.
    """
    batch, heads, tokens, head_dim = x.shape
    out = torch.empty(batch, tokens, heads, head_dim, dtype=x.dtype, device=x.device).transpose(1, 2)
    half = head_dim // 2
    block_d = triton.next_power_of_2(half)
    block_h = max(1, min(triton.next_power_of_2(heads), 2048 // block_d))  # 16 pairs a thread
    num_warps = min(max(block_h * block_d // 512, 1), 4)
    _rotary_kernel[(tokens, batch, triton.cdiv(heads, block_h))](
        out, *out.stride()[:3], x, *x.stride()[:3], cos, sin,
        cos.stride(0) if len(cos) > 1 else 0, cos.stride(1), heads, half,
        BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
