"""Co-activations of a gated MLP, h = act(gate) * up: how much each weight changes h, to first order, squared.

acc_gate[i, j] += sum_t (up[t, i] * act'(gate[t, i]))^2 * x[t, j]^2
acc_up[i, j]   += sum_t act(gate[t, i])^2 * x[t, j]^2

gate, up [tokens, out], x [tokens, in], both sums fp32 [out, in]. 4 * tokens * out * in FLOP on tensor cores:
the roof is the matmul rate from about 2,000 tokens a call. One elementwise pass reads gate, up and x once and
writes three operands and the partial sums of x^2: 12 bytes read and written for each pair of gate and up in
16 bits, 4 for each x. Two matmuls that share the squares of x follow, by cuBLAS, or by Triton where torch
cannot add to fp32 or where there are offsets. Squares are rounded to bf16 for either 16-bit input, because
fp16 overflows at 256^2. All terms are positive, so a sum's relative error stays below an operand pair's,
2^-7.
Source: this project's `gated` method, derived in docs/gated.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.fp32_sums import add_product_, addmm_adds_to_fp32
from wanda_kernels.native.ops import as_rows
from wanda_kernels.triton_ops.add_coactivation import add_fused_
from wanda_kernels.triton_ops.add_sq_norm import add_sq_norm_, add_total_, slabs
from wanda_kernels.triton_ops.grouped_product import add_grouped_product_


@triton.jit
def _activate_with_slope(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)) in fp32."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        y = x * s
        slope = s + y * (1.0 - s)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":  # x * s(v), s the sigmoid
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        y = x * s
        slope = s + y * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    else:
        y = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@triton.jit
def _gated_operands_kernel(
    gate_ptr, stride_gt,
    up_ptr, stride_ut,
    x_ptr, stride_xt,
    of_gate_ptr, of_up_ptr,  # [n_tokens, n_out]
    x_squared_ptr,  # [n_tokens, n_in]
    partial_ptr,  # fp32 [slabs, n_in], sums of x^2 where SUMS
    n_tokens, n_out, n_in, slab_tokens,
    ACTIVATION: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_out = tl.cdiv(n_out, BLOCK_N)
    slab = tl.program_id(1).to(tl.int64)
    first, end = slab * slab_tokens, tl.minimum((slab + 1) * slab_tokens, n_tokens)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if tile < tiles_out:
        cols = tile * BLOCK_N + offs_n
        for start in range(first, end, BLOCK_M):
            tokens = (start + offs_m)[:, None]
            inside = (tokens < end) & (cols < n_out)[None, :]
            gate = tl.load(gate_ptr + tokens * stride_gt + cols[None, :], mask=inside, other=0.0)
            up = tl.load(up_ptr + tokens * stride_ut + cols[None, :], mask=inside, other=0.0)
            y, slope = _activate_with_slope(gate.to(tl.float32), ACTIVATION)  # [BLOCK_M, BLOCK_N]
            effect = up.to(tl.float32) * slope
            at = tokens * n_out + cols[None, :]
            tl.store(of_gate_ptr + at, (effect * effect).to(of_gate_ptr.dtype.element_ty), mask=inside)
            tl.store(of_up_ptr + at, (y * y).to(of_up_ptr.dtype.element_ty), mask=inside)
    else:
        cols = (tile - tiles_out) * BLOCK_N + offs_n
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(first, end, BLOCK_M):
            tokens = (start + offs_m)[:, None]
            inside = (tokens < end) & (cols < n_in)[None, :]
            x = tl.load(x_ptr + tokens * stride_xt + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            at = tokens * n_in + cols[None, :]
            tl.store(x_squared_ptr + at, (x * x).to(x_squared_ptr.dtype.element_ty), mask=inside)
            if SUMS:
                sums += x * x
        if SUMS:
            tl.store(partial_ptr + slab * n_in + cols, tl.sum(sums, axis=0), mask=cols < n_in)


def operands(
    gate: Tensor, up: Tensor, x: Tensor, activation: str | None, sq_norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(up * act'(gate))^2, act(gate)^2 and x^2 as operands; the column sums of x^2 are added to sq_norm."""
    (n_tokens, n_out), n_in = gate.shape, x.shape[1]
    n_slabs, slab_tokens = slabs(n_tokens)
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    of_gate, of_up = (torch.empty(n_tokens, n_out, dtype=dtype, device=x.device) for _ in range(2))
    x_squared = torch.empty(n_tokens, n_in, dtype=dtype, device=x.device)
    partial = x_squared
    if sq_norm is not None:
        partial = torch.empty(n_slabs, n_in, dtype=torch.float32, device=x.device)
    # 16 x 128 on 4 warps: two 16-byte loads of gate and two of up a thread; 32 x 128 would spill for fp16
    _gated_operands_kernel[(triton.cdiv(n_out, 128) + triton.cdiv(n_in, 128), n_slabs)](
        gate, gate.stride(0), up, up.stride(0), x, x.stride(0), of_gate, of_up, x_squared, partial,
        n_tokens, n_out, n_in, slab_tokens,
        ACTIVATION=activation, SUMS=sq_norm is not None, BLOCK_M=16, BLOCK_N=128, num_warps=4,
    )  # fmt: skip
    if sq_norm is not None:
        add_total_(sq_norm, partial)
    return of_gate, of_up, x_squared


def _add_product_(acc: Tensor, weights: Tensor, x_squared: Tensor) -> None:
    """acc += weights^T x_squared, summed in fp32."""
    if x_squared.dtype == torch.float32 or addmm_adds_to_fp32(acc.device.type):
        add_product_(acc, weights, x_squared)
    else:
        add_fused_(acc, weights, x_squared, None, 1)


def add_gated_coactivation_(
    acc_gate: Tensor,
    acc_up: Tensor,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    activation: str | None,
    sq_norm: Tensor | None,
    offsets: Tensor | None = None,
) -> None:
    gate, up, x = as_rows(gate), as_rows(up), as_rows(x)
    if offsets is not None:
        *effects, x_squared = operands(gate, up, x, activation, None)
        for acc, effect in zip((acc_gate, acc_up), effects, strict=True):
            add_grouped_product_(acc, effect, x_squared, offsets)
        if sq_norm is not None:
            add_sq_norm_(sq_norm, x, offsets)
        return
    of_gate, of_up, x_squared = operands(gate, up, x, activation, sq_norm)
    _add_product_(acc_gate, of_gate, x_squared)
    _add_product_(acc_up, of_up, x_squared)
