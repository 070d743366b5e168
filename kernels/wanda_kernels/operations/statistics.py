"""Sums over calibration tokens, the statistics that scores are made of. Each adds to an fp32 sum in place.

With `offsets`, one call adds to the sums of many experts. Tokens are sorted by expert: rows offsets[e] to
offsets[e + 1] - 1 of every operand are those of expert e, which may have none. Rows before the first offset
and behind the last are ignored.
"""

from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.backends import call


def add_sq_norm_(acc: Tensor, x: Tensor, offsets: Tensor | None = None, backend: str = "auto") -> None:
    """acc[j] += sum over tokens t of x[t, j]^2; with offsets, acc[e, j] += the same over expert e's tokens.

    Args:
        acc: fp32 `[in]`, contiguous; added to in place. With offsets: `[experts, in]`, rows contiguous.
        x: fp32, fp16 or bf16 `[..., in]`, on acc's device; the dimensions before the last are tokens. Squares
            and sums are fp32. With no tokens, acc stays as it is. With offsets: `[tokens, in]`.
        offsets: optional int32 or int64 `[experts + 1]`, contiguous, on acc's device, ascending, within 0 and
            the number of tokens. The values are checked on a CPU alone: the host does not wait for a GPU.
        backend: "auto", "torch", "triton", "cuda" or "cpu"; see `choose_backend`.

    Backends may differ in the last bits of a sum. On a CPU an expert's sum has the bits of a call with its
    tokens alone; on a GPU the last bits may differ. There is no gradient.

    Raises: `ValueError` on wrong shapes, dtypes or devices, with the numbers, before acc is changed;
        `BackendError` if the named backend cannot serve. NaN and infinities in x are not refused.
    Source: Wanda, arXiv 2306.11695, section 3 (the norm in its score).
    """
    checks.require_activations(x)
    checks.require_offsets(offsets, x, acc)
    checks.require_sums(acc, (x.shape[-1],), offsets)
    checks.require_same_device("x", x, acc)
    if x.numel() and acc.numel():
        call("add_sq_norm_", acc, x, offsets, backend)


def add_coactivation_(
    acc: Tensor,
    gate: Tensor,
    x: Tensor,
    activation: str | None = "silu",
    power: int = 1,
    sq_norm: Tensor | None = None,
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """acc[i, j] += sum over tokens t of abs(act(gate[t, i]))^power * abs(x[t, j])^power.

    With offsets, acc[e, i, j] += the same over expert e's tokens.

    Args:
        acc: fp32 `[out, in]`, contiguous; added to in place. With offsets: `[experts, out, in]`, each
            expert's matrix contiguous.
        gate: fp32, fp16 or bf16 `[..., out]`, the gate projection's output before its activation.
        x: `[..., in]` in gate's dtype, the input that gate and up projection share, of the same tokens.
        activation: "silu", "gelu", "gelu_tanh", "relu", or None for gate as it is.
        power: 1 (Wanda-CoNNect) or 2.
        sq_norm: optional fp32 `[in]`, contiguous; sum x^2 is added to it in place, in the same read of x.
            With offsets: `[experts, in]`, rows contiguous; x is read again.
        offsets: as in `add_sq_norm_`; gate and x are then `[tokens, features]`.
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`.

    Sums are fp32. For 16-bit inputs a backend may round abs(act(gate))^power and abs(x)^power to 16 bits:
    a relative error of at most 2^-7, or 2^-10 for fp16 and power 1. An expert's sum may differ in its last
    bits from a call with its tokens alone. There is no gradient.

    Raises: `ValueError` on wrong shapes, dtypes, devices, activation or power, before any sum is changed;
        `BackendError` if the named backend cannot serve. NaN and infinities are not refused.
    Source: Wanda-CoNNect, which feeds the value after the activation.
    """
    checks.require_activations(gate, "gate")
    checks.require_activations(x)
    if gate.shape[:-1] != x.shape[:-1] or gate.dtype != x.dtype:
        raise ValueError(
            f"gate and x must have the same tokens and dtype, got {_brief(gate)} and {_brief(x)}"
        )
    checks.require_offsets(offsets, x, acc)
    checks.require_sums(acc, (gate.shape[-1], x.shape[-1]), offsets)
    if sq_norm is not None:
        checks.require_sums(sq_norm, (x.shape[-1],), offsets, "sq_norm")
    for name, operand in {"gate": gate, "x": x, "sq_norm": sq_norm}.items():
        checks.require_same_device(name, operand, acc)
    checks.require_activation(activation)
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if x.numel() and acc.numel():
        call("add_coactivation_", acc, gate, x, activation, power, sq_norm, offsets, backend)


def add_gated_coactivation_(
    acc_gate: Tensor,
    acc_up: Tensor,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    activation: str | None = "silu",
    sq_norm: Tensor | None = None,
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """How much each weight of gate and up projection changes h = act(gate) * up, to first order, squared.

        acc_gate[i, j] += sum over tokens t of (up[t, i] * act'(gate[t, i]))^2 * x[t, j]^2
        acc_up[i, j]   += sum over tokens t of act(gate[t, i])^2 * x[t, j]^2

    With offsets, acc_gate[e] and acc_up[e] += the same over expert e's tokens.

    Args:
        acc_gate, acc_up: fp32 `[out, in]`, contiguous; added to in place. With offsets:
            `[experts, out, in]`, each expert's matrix contiguous.
        gate, up: fp32, fp16 or bf16 `[..., out]` of one dtype, the projections' outputs; gate before its
            activation.
        x: `[..., in]` in the same dtype, the input that both projections share, of the same tokens.
        activation: "silu", "gelu", "gelu_tanh" or "relu"; or None if gate holds act(gate) already, and up
            holds up * act'(gate).
        sq_norm: optional fp32 `[in]`, contiguous; sum x^2 is added to it in place, in the same read of x.
            With offsets: `[experts, in]`, rows contiguous; x is read again.
        offsets: as in `add_sq_norm_`; gate, up and x are then `[tokens, features]`.
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`.

    Sums are fp32. For 16-bit inputs a backend may round the squares to bf16: a relative error of at most
    2^-7. An expert's sums may differ in their last bits from a call with its tokens alone. There is no
    gradient.

    Raises: `ValueError` on wrong shapes, dtypes, devices or activation, before any sum is changed;
        `BackendError` if the named backend cannot serve. NaN and infinities are not refused.
    Source: this project's `gated` method, derived in docs/gated.md.
    """
    checks.require_activations(gate, "gate")
    checks.require_activations(x)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate and up must match, got {_brief(gate)} and {_brief(up)}")
    if gate.shape[:-1] != x.shape[:-1] or gate.dtype != x.dtype:
        raise ValueError(
            f"gate and x must have the same tokens and dtype, got {_brief(gate)} and {_brief(x)}"
        )
    checks.require_offsets(offsets, x, acc_gate)
    checks.require_sums(acc_gate, (gate.shape[-1], x.shape[-1]), offsets, "acc_gate")
    checks.require_sums(acc_up, (gate.shape[-1], x.shape[-1]), offsets, "acc_up")
    if sq_norm is not None:
        checks.require_sums(sq_norm, (x.shape[-1],), offsets, "sq_norm")
    for name, operand in {"acc_up": acc_up, "gate": gate, "up": up, "x": x, "sq_norm": sq_norm}.items():
        checks.require_same_device(name, operand, acc_gate)
    checks.require_activation(activation)
    if x.numel() and acc_gate.numel():
        call("add_gated_coactivation_", acc_gate, acc_up, gate, up, x, activation, sq_norm, offsets, backend)


def add_hessian_(acc: Tensor, x: Tensor, offsets: Tensor | None = None, backend: str = "auto") -> None:
    """acc[i, j] += sum over tokens t of x[t, i] * x[t, j]; with offsets, acc[e, i, j] += the same over expert
    e's tokens.

    Args:
        acc: fp32 `[in, in]`, contiguous, symmetric; added to in place. Both triangles are filled, and stay
            symmetric to the bit. With offsets: `[experts, in, in]`, each expert's matrix contiguous; a matrix
            whose expert has no tokens stays as it is.
        x: fp32, fp16 or bf16 `[..., in]`, on acc's device; the dimensions before the last are tokens.
            Products are exact for 16-bit inputs and sums are fp32. With no tokens, acc stays as it is.
        offsets: as in `add_sq_norm_`; x is then `[tokens, in]`.
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`.

    Backends may differ in the last bits of a sum, and so may an expert's sum from a call with its tokens
    alone. There is no gradient.

    Raises: `ValueError` on wrong shapes, dtypes or devices, with the numbers, before acc is changed;
        `BackendError` if the named backend cannot serve. NaN and infinities in x are not refused.
    Source: SparseGPT, arXiv 2301.00774, section 3. Its published code divides by the number of samples; no
        result depends on that.
    """
    checks.require_activations(x)
    checks.require_offsets(offsets, x, acc)
    checks.require_sums(acc, (x.shape[-1], x.shape[-1]), offsets)
    checks.require_same_device("x", x, acc)
    if x.numel() and acc.numel():
        call("add_hessian_", acc, x, offsets, backend)


def _brief(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
