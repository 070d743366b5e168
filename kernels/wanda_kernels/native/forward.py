"""A block's forward on a CPU by kernels of ours: what torch's own operations give, but for rounding.

Each has a question beside it: whether these operands are its, on this machine.
"""

import torch
from torch import Tensor

from wanda_kernels.native import reused_memory
from wanda_kernels.native.ops import ACTIVATION_CODES, _op, as_rows, why_not

LINEAR_TOKENS = 64  # from here on a weight's preparation is paid back


def takes_rows(*tensors: Tensor) -> bool:
    """Whether `rms_norm` and `gated_product` take these: fp32 or bf16 of one dtype, on the CPU."""
    dtype = tensors[0].dtype
    alike = all(each.dtype == dtype and each.device.type == "cpu" and each.numel() for each in tensors)
    return alike and dtype in (torch.float32, torch.bfloat16) and not why_not("cpu")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean of x^2 over features + epsilon)) of `[..., features]`, computed in fp32; the
    quotient is rounded to x's dtype before it meets the weight, as in Llama."""
    rows = as_rows(x)
    out = reused_memory.empty(*rows.shape, dtype=x.dtype)
    _op("native_rms_norm_")(out, rows, weight, epsilon)
    return out.view(x.shape)


def gated_product(gate: Tensor, up: Tensor, activation: str | None, out: Tensor | None = None) -> Tensor:
    """act(gate) * up, elementwise; act(gate) is rounded to their dtype first. out: gate or up themselves, or
    another contiguous tensor like them."""
    out = reused_memory.empty(*gate.shape, dtype=gate.dtype) if out is None else out
    _op("native_gated_product_")(as_rows(out), as_rows(gate), as_rows(up), ACTIVATION_CODES[activation])
    return out


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether shapes and strides are a rotary embedding's: heads of an even size, features side by side."""
    shapes = x.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and cos.stride() == sin.stride()
    fit = shapes and cos.shape[1:] == x.shape[2:] and cos.shape[0] in (1, x.shape[0])
    even = fit and x.shape[-1] % 2 == 0 and all(stride % 2 == 0 for stride in x.stride()[:3])
    return even and x.stride(-1) == cos.stride(-1) == 1


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` takes these: fp32 or bf16 of one dtype, on the CPU, of an even head_dim."""
    return turns(x, cos, sin) and takes_rows(x, cos, sin)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x's upper half, x's lower half) sin, rounded as torch's separate operations round.

    Args:
        x: `[batch, heads, tokens, head_dim]`, such that `rotates`.
        cos, sin: `[batch or 1, tokens, head_dim]`.
    Returns: the like, a view of contiguous `[batch, tokens, heads, head_dim]`.
    """
    batch, heads, tokens, head_dim = x.shape
    out = reused_memory.empty(batch, tokens, heads, head_dim, dtype=x.dtype).transpose(1, 2)
    _op("native_rotate_")(out, x, *(turn.expand(batch, -1, -1) for turn in (cos, sin)))
    return out


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` takes these operands, and is faster here than torch's own.

    That is so with AVX2; of AVX-512, for fp32, and for bf16 with AVX-512-BF16 but without AMX, which torch's
    own uses.
    """
    same = query.dim() == 4 and query.shape[2] == key.shape[2] == value.shape[2] and key.shape == value.shape
    cpu = all(each.device.type == "cpu" and each.dtype == query.dtype for each in (query, key, value))
    even = all(stride % 2 == 0 for each in (query, key, value) for stride in each.stride()[:3])
    rows = all(each.stride(-1) == 1 for each in (query, key, value)) and query.shape[-1] == key.shape[-1]
    whole = same and query.numel() > 0 and query.shape[1] % key.shape[1] == 0
    return whole and cpu and even and rows and not why_not("cpu") and _op("native_attends")(query)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * query key^T, each token seeing itself and those before) value.

    Args:
        query: fp32 or bf16 `[batch, heads, tokens, head_dim]`, such that `attends`.
        key, value: the same with as many heads or fewer, each shared by as many of the query's in a row.
        scale: default 1 / sqrt(head_dim).
    Returns: `[batch, heads, tokens, head_dim]`, a view of contiguous `[batch, tokens, heads, head_dim]`.
    """
    batch, heads, tokens, head_dim = query.shape
    out = reused_memory.empty(batch, tokens, heads, head_dim, dtype=query.dtype).transpose(1, 2)
    _op("native_attend_")(out, query, key, value, head_dim**-0.5 if scale is None else scale)
    return out


def multiplies(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, sparse: bool) -> bool:
    """Whether `sparse_linear`, or `dense_linear`, takes these operands, and is faster here than torch's own.

    That is so for fp32 and bf16, from some tokens on. Sparse: with AVX2 and no AVX-512, and on AMD's cores
    with AVX-512-BF16 and VBMI2. Dense: on AMD's cores with AVX2 and no AVX-512.
    """
    operands = [each for each in (x, weight, bias) if each is not None]
    alike = all(each.dtype == x.dtype and each.device.type == "cpu" for each in operands)
    enough = x.numel() >= LINEAR_TOKENS * x.shape[-1] > 0
    rows = weight.dim() == 2 and weight.numel() > 0 and weight.stride(1) == 1
    return alike and enough and rows and not why_not("cpu") and _op("native_multiplies")(weight, sparse)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """x weight^T + bias, without the products of the weight's zeros; None where too few of them lie right.

    Args:
        x: fp32 or bf16 `[..., in]`, such that `multiplies`.
        weight: `[out, in]`. AVX2: of 96 rows, counted from the first, at most three quarters of the elements
            may be other than zero. AVX-512: of every 64 bytes of a row, counted from its begin, at most half:
            so it is after 2:4, 4:8, 8:16, and in bf16 16:32.
        bias: contiguous `[out]`, or None.
    """
    return _linear(x, weight, bias, sparse=True)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, summed in fp32, of operands such that `multiplies`; shapes as in `sparse_linear`."""
    return _linear(x, weight, bias, sparse=False)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, sparse: bool) -> Tensor | None:
    rows = as_rows(x)
    out = reused_memory.empty(len(rows), len(weight), dtype=x.dtype)
    fits = _op("native_linear_")(out, rows, weight, bias, sparse)
    return out.view(*x.shape[:-1], len(weight)) if fits else None
