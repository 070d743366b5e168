"""Packed rows (bits and kept weights): a product with few rows of x, and the weight itself."""

import torch
from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.backends import TABLE, call, choose_backend
from wanda_kernels.mask_bits import PackedRows

PACKED_LINEAR_ROWS = 8  # of x, in one call of packed_linear


def packed_linear(
    x: Tensor,
    packed: PackedRows,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    check_operands: bool = True,
) -> Tensor:
    """x weight^T + bias for a packed weight and few rows of x, as in decoding.

    Args:
        x: fp32, fp16 or bf16 `[..., in]`, at most 8 rows (`PACKED_LINEAR_ROWS`) in all.
        packed: a weight `[out, in]` as `pack_rows` packs it, with values of x's dtype, on x's device. Offsets
            are positions in values and may begin above 0, so that `bits[a:b]` and `offsets[a : b + 1]` are
            rows a to b - 1. Each row must have as many values as bits. This is not checked: with other
            contents the result is undefined, and no memory outside of the operands is read.
        bias: optional `[out]` of x's dtype.
        backend: "auto", "torch", "triton", "cuda" or "cpu"; see `choose_backend`. Backends may differ in the
            last bits of a sum.
        check_operands: False if the caller has checked them: a call takes 12 microseconds less.

    Products and sums are fp32; the bias is added and the result rounded once. A row's result depends neither
    on the other rows of x nor on the number of threads. Pruned weights contribute nothing, even if x is
    infinite or NaN there. There is no gradient. Nothing is changed in place.

    Returns: `[..., out]` in x's dtype, contiguous.
    Raises: `ValueError` on wrong shapes, dtypes, devices or too many rows, with the numbers; `BackendError`
        if the named backend cannot serve.
    Source: the bitmap of SparAMX, arXiv 2502.12444, a row at a time.
    """
    if check_operands:
        _require_linear(x, packed, bias)
    if not (x.numel() and packed.bits.numel()):
        out = x.new_zeros(*x.shape[:-1], packed.bits.shape[0])
        return out if bias is None else out + bias
    if x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if choose_backend("packed_linear", x.device, backend) == "cpu":
            # No setting of torch's changes this product, and `call` takes longer than a small one.
            return TABLE["packed_linear"]["cpu"](x, *packed, bias)
    return call("packed_linear", x, *packed, bias, backend)


def unpack_rows(
    packed: PackedRows, in_features: int, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The weight that `pack_rows` packed, with the same bits.

    Args:
        packed: rows of a weight, or of a stack of weights, as for `packed_linear`; values of any dtype of 1,
            2, 4 or 8 bytes.
        in_features: columns of the weight.
        out: optional contiguous `[out, in]` or `[experts, out, in]` of the values' dtype and device, written
            in place; without it the result is a new tensor.
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`. All give the same bits.

    Returns: `out`, or a new tensor of its shape.
    Raises: `ValueError` on wrong shapes, dtypes or devices, with the numbers, before out is changed;
        `BackendError` if the named backend cannot serve.
    Source: this project's packed format, docs/packed.md.
    """
    checks.require_packed(packed, in_features, packed.bits.device)
    bits, values, offsets = packed
    shape = (*bits.shape[:-1], in_features)
    if out is None:
        out = torch.empty(shape, dtype=values.dtype, device=bits.device)
    elif out.shape != shape or out.dtype != values.dtype or not out.is_contiguous():
        got = f"{out.dtype} {list(out.shape)}"
        raise ValueError(f"out must be contiguous {values.dtype} {list(shape)}, got {got}")
    checks.require_same_device("out", out, bits)
    if out.numel():
        call("unpack_rows", out, bits, values, offsets, backend)
    return out


def _require_linear(x: Tensor, packed: PackedRows, bias: Tensor | None) -> None:
    checks.require_activations(x)
    checks.require_packed(packed, x.shape[-1], x.device)
    bits, values, _ = packed
    if bits.dim() != 2:
        raise ValueError(f"packed must be one weight, with bits [out, bytes], got shape {list(bits.shape)}")
    if values.dtype != x.dtype:
        raise ValueError(f"values must have x's dtype, got {values.dtype} and {x.dtype}")
    n_rows = x.shape[:-1].numel()
    if n_rows > PACKED_LINEAR_ROWS:
        raise ValueError(f"x must have at most {PACKED_LINEAR_ROWS} rows, got {n_rows} in {list(x.shape)}")
    if bias is None:
        return
    if bias.dtype != x.dtype or bias.shape != bits.shape[:1]:
        got = f"{bias.dtype} {list(bias.shape)}"
        raise ValueError(f"bias must be {x.dtype} [{len(bits)}], got {got}")
    checks.require_same_device("bias", bias, x)
