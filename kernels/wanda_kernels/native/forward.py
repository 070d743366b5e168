"""Kernels for a block's forward on a CPU. Except for rounding, results equal those of torch's operations.

Each kernel comes with a function that says whether it takes given operands on this machine.
"""

import torch
from torch import Tensor

from wanda_kernels.native import reused_memory
from wanda_kernels.native.library import native_op, why_not
from wanda_kernels.native.ops import ACTIVATION_CODES, as_rows

LINEAR_TOKENS = 64  # with fewer tokens, preparing the weight takes longer than the product saves


def takes_rows(*tensors: Tensor) -> bool:
    """Whether `rms_norm` and `gated_product` take these: on the CPU, all fp32 or all bf16, not empty."""
    dtype = tensors[0].dtype
    alike = all(each.dtype == dtype and each.device.type == "cpu" and each.numel() for each in tensors)
    return alike and dtype in (torch.float32, torch.bfloat16) and not why_not("cpu")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean of x^2 over features + epsilon)), computed in fp32.

    The quotient is rounded to x's dtype before it is multiplied by the weight, as in Llama.

    Args:
        x: `[..., features]`, such that `takes_rows(x, weight)`.
        weight: contiguous `[features]`.
    """
    rows = as_rows(x)
    out = reused_memory.empty(*rows.shape, dtype=x.dtype)
    native_op("native_rms_norm_")(out, rows, weight, epsilon)
    return out.view(x.shape)


def gated_product(gate: Tensor, up: Tensor, activation: str | None, out: Tensor | None = None) -> Tensor:
    """act(gate) * up, elementwise. act(gate) is rounded to its dtype before the product.

    Args:
        gate, up: `[..., features]`, such that `takes_rows(gate, up)`.
        out: where the result goes: gate, up, or another contiguous tensor of their shape and dtype.
    """
    out = reused_memory.empty(*gate.shape, dtype=gate.dtype) if out is None else out
    native_op("native_gated_product_")(as_rows(out), as_rows(gate), as_rows(up), ACTIVATION_CODES[activation])
    return out


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether shapes and strides fit a rotary embedding: an even head_dim, and contiguous features."""
    shapes = x.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and cos.stride() == sin.stride()
    fit = shapes and cos.shape[1:] == x.shape[2:] and cos.shape[0] in (1, x.shape[0])
    even = fit and x.shape[-1] % 2 == 0 and all(stride % 2 == 0 for stride in x.stride()[:3])
    return even and x.stride(-1) == cos.stride(-1) == 1


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` takes these tensors: on the CPU, all fp32 or all bf16, with an even head_dim."""
    return turns(x, cos, sin) and takes_rows(x, cos, sin)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + concat(-x's upper half, x's lower half) * sin, rounded where torch's operations round.

    Args:
        x: `[batch, heads, tokens, head_dim]`, such that `rotates(x, cos, sin)`.
        cos, sin: `[batch or 1, tokens, head_dim]`.
    Returns: `[batch, heads, tokens, head_dim]`, a view of contiguous `[batch, tokens, heads, head_dim]`.
    """
    batch, heads, tokens, head_dim = x.shape
    out = reused_memory.empty(batch, tokens, heads, head_dim, dtype=x.dtype).transpose(1, 2)
    native_op("native_rotate_")(out, x, *(turn.expand(batch, -1, -1) for turn in (cos, sin)))
    return out


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` takes these operands and is faster than torch's attention on this machine.

    It is faster with AVX2. With AVX-512 it is faster for fp32, and for bf16 on processors with AVX-512-BF16
    but without AMX, which torch's attention uses.
    """
    same = query.dim() == 4 and query.shape[2] == key.shape[2] == value.shape[2] and key.shape == value.shape
    cpu = all(each.device.type == "cpu" and each.dtype == query.dtype for each in (query, key, value))
    even = all(stride % 2 == 0 for each in (query, key, value) for stride in each.stride()[:3])
    rows = all(each.stride(-1) == 1 for each in (query, key, value)) and query.shape[-1] == key.shape[-1]
    whole = same and query.numel() > 0 and query.shape[1] % key.shape[1] == 0
    return whole and cpu and even and rows and not why_not("cpu") and native_op("native_attends")(query)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * query key^T) value, where each token attends to itself and earlier tokens.

    Args:
        query: fp32 or bf16 `[batch, heads, tokens, head_dim]`, such that `attends(query, key, value)`.
        key, value: the same with kv_heads heads. Each serves heads / kv_heads consecutive heads of the query.
        scale: default 1 / sqrt(head_dim).
    Returns: `[batch, heads, tokens, head_dim]`, a view of contiguous `[batch, tokens, heads, head_dim]`.
    """
    batch, heads, tokens, head_dim = query.shape
    out = reused_memory.empty(batch, tokens, heads, head_dim, dtype=query.dtype).transpose(1, 2)
    native_op("native_attend_")(out, query, key, value, head_dim**-0.5 if scale is None else scale)
    return out


def multiplies(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, sparse: bool) -> bool:
    """Whether `sparse_linear`, or `dense_linear`, takes these operands and is faster than torch's product.

    Both take fp32 and bf16, and need LINEAR_TOKENS tokens. The sparse product is faster with AVX2 and no
    AVX-512, and on AMD processors with AVX-512-BF16 and VBMI2. The dense one is faster on AMD processors with
    AVX2 and no AVX-512.
    """
    operands = [each for each in (x, weight, bias) if each is not None]
    alike = all(each.dtype == x.dtype and each.device.type == "cpu" for each in operands)
    enough = x.numel() >= LINEAR_TOKENS * x.shape[-1] > 0
    rows = weight.dim() == 2 and weight.numel() > 0 and weight.stride(1) == 1
    return alike and enough and rows and not why_not("cpu") and native_op("native_multiplies")(weight, sparse)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """x weight^T + bias, skipping the products of the weight's zeros.

    Args:
        x: fp32 or bf16 `[..., in]`, such that `multiplies(x, weight, bias, sparse=True)`.
        weight: `[out, in]`. AVX2: in each group of 96 rows, at most three quarters of the elements may be
            non-zero. AVX-512: in each 64 bytes of a row, at most half of the elements may be non-zero. 2:4,
            4:8 and 8:16 satisfy that, and 16:32 in bf16.
        bias: contiguous `[out]`, or None.
    Returns: `[..., out]`, or None if the weight has more non-zero elements than that.
    """
    return _linear(x, weight, bias, sparse=True)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, summed in fp32.

    Args:
        x: fp32 or bf16 `[..., in]`, such that `multiplies(x, weight, bias, sparse=False)`.
        weight: `[out, in]`.
        bias: contiguous `[out]`, or None.
    Returns: `[..., out]`.
    """
    return _linear(x, weight, bias, sparse=False)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, sparse: bool) -> Tensor | None:
    rows = as_rows(x)
    out = reused_memory.empty(len(rows), len(weight), dtype=x.dtype)
    fits = native_op("native_linear_")(out, rows, weight, bias, sparse)
    return out.view(*x.shape[:-1], len(weight)) if fits else None
