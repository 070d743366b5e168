"""A faster forward of a block on a CPU: attention and matrix products run by other kernels than torch's.

The choice of kernels depends on the machine and the dtype, never on timing, so that two runs on one machine
give the same bytes. With `WANDA_KERNELS_BACKEND=torch` everything runs by torch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wanda_kernels import forward

# Tokens per product when bf16 is multiplied in fp32, so that the fp32 copies stay small.
WIDENED_TOKENS = 512
# Weights widened at a time, 256 MiB: a head can have far more.
WIDENED_WEIGHTS = 2**26


def faster_forward(device: torch.device):
    """Context in which forwards on `device` run by faster kernels. It affects the calling thread only."""
    return _Replacing() if device.type == "cpu" and replacements() else nullcontext()


def replacements() -> dict[Callable, Callable]:
    """torch function -> its replacement on a CPU, which returns None for a call that torch must do."""
    return _of_this_machine() if forward.allows("cpu") else {}


def described(device: torch.device) -> list[str]:
    """Names of the functions that are replaced on `device`.

    They decide the last bits of a forward, so a run is resumed only if they are the same.
    """
    modules = [] if forward.elementwise_kernels(device) is None else ["gated_product", "rms_norm", "rotary"]
    functions = replacements() if device.type == "cpu" else {}
    return sorted([*modules, *(function.__name__ for function in functions)])


class _Replacing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        replacement = _of_this_machine().get(func)
        if replacement is not None:
            output = replacement(*args, **(kwargs or {}))
            if output is not None:
                return output
        return func(*args, **(kwargs or {}))


@cache
def _of_this_machine() -> dict[Callable, Callable]:
    attention = {F.scaled_dot_product_attention: _causal_attention} if forward.has_cpu_kernels() else {}
    return {F.linear: _linear} | attention


def _causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if attn_mask is not None or not is_causal or dropout_p or not forward.attends(query, key, value):
        return None
    return forward.causal_attention(query, key, value, scale)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`F.linear`: skips the zeros of a pruned weight, and avoids the cases where torch is slow.

    None if the operands are not plain CPU tensors of one dtype, or need a gradient.
    """
    operands = [each for each in (x, weight, bias) if each is not None]
    alike = all(each.dtype == x.dtype and each.device.type == "cpu" for each in operands)
    wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in operands)
    if not alike or wants_gradient or weight.dim() != 2 or not x.numel():
        return None
    sparse = forward.multiplies(x, weight, bias, sparse=True)
    if sparse and (output := forward.sparse_linear(x, weight, bias)) is not None:
        return output
    if forward.multiplies(x, weight, bias, sparse=False):
        return forward.dense_linear(x, weight, bias)
    if x.dtype == torch.bfloat16 and not multiplies_bf16():
        return _linear_in_fp32(x, weight, bias)
    if x.dtype == torch.float32 and _onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return _torchs_linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _torchs_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Bit for bit the result of `F.linear`, in reused memory."""
    output = forward.empty(len(rows), len(weight), dtype=rows.dtype)
    if bias is None:
        return torch.mm(rows, weight.t(), out=output)
    return torch.addmm(bias, rows, weight.t(), out=output)


def _linear_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    output = forward.empty(len(rows), len(weight), dtype=x.dtype)
    step = max(1, WIDENED_WEIGHTS // weight.shape[1])
    for begin in range(0, len(weight), step):
        band = slice(begin, begin + step)
        wide, wide_bias = _widened(weight[band]), None if bias is None else bias[band].float()
        for part, target in zip(rows.split(WIDENED_TOKENS), output.split(WIDENED_TOKENS), strict=True):
            target[:, band] = _torchs_linear(_widened(part), wide, wide_bias)
    return output.view(*x.shape[:-1], len(weight))


def _widened(matrix: Tensor) -> Tensor:
    return forward.empty(*matrix.shape, dtype=torch.float32).copy_(matrix)


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has instructions for bf16 products.

    Without them torch's bf16 products are many times slower than fp32 ones. The product of two bf16 numbers
    is exact in fp32.
    """
    return _has("avx512_bf16")


@cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN is faster than MKL, which torch uses for fp32.

    On AMD processors MKL uses AVX2 even if the processor has AVX-512.
    """
    return _made_by_amd() and _has("avx512_f") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _has(feature: str) -> bool:
    """Whether torch reports a feature of the processor by this name."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get(feature))


def _made_by_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()
