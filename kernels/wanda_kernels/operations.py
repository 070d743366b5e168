"""The operations that users call: check, pick a backend, run. In place where the name ends in `_`.

Common arguments:
    weight: fp32, fp16 or bf16 `[out, in]`, rows contiguous; pruned weights become +0.0.
    scale: the statistic under the root, fp32 `[in]` or `[out, in]`, or None for plain magnitude.
        A weight's score is abs(W) * sqrt(scale) in fp32. Equal scores lose the lower column first.
    mask: optional uint8 `[out, ceil(in / 8)]` that receives the packed mask: bit j % 8 of byte j // 8 is 1
        where column j was kept, padding bits are 0.
    backend: "auto", "torch", "triton", "cuda" or "cpu"; see `backends.py`.
    check_finite: judge weight and scale first, which waits for a GPU. False: the caller has.

Raises `ValueError`, with the numbers, on shapes, dtypes or counts that do not fit, and on NaN, infinity or a
negative scale; the weight is then untouched. No operation has a gradient: parameters are changed in place as
other tensors are, and no graph is kept.
"""

from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.torch_ops import call
from wanda_kernels.hessian_factor import Factor
from wanda_kernels.sparsegpt import SELECTORS


def add_sq_norm_(acc: Tensor, x: Tensor, backend: str = "auto") -> None:
    """acc[j] += sum over tokens of x[t, j]^2.

    Args:
        acc: fp32 `[in]`, added to in place.
        x: fp32, fp16 or bf16 `[..., in]`; squares and sums are fp32.
    Source: Wanda, arXiv 2306.11695, section 3 (the norm under the root).
    """
    checks.require_activations(x)
    checks.require_accumulator(acc, (x.shape[-1],))
    checks.require_same_device("x", x, acc)
    if x.numel():
        call("add_sq_norm_", acc, x, backend)


def add_coactivation_(
    acc: Tensor,
    gate: Tensor,
    x: Tensor,
    activation: str | None = "silu",
    power: int = 1,
    sq_norm: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """acc[i, j] += sum over tokens of abs(act(gate[t, i]))^power * abs(x[t, j])^power.

    Args:
        acc: fp32 `[out, in]`, added to in place.
        gate: `[..., out]`, the gate projection's output before its activation.
        x: `[..., in]`, the input that gate and up projection share; the same tokens as gate.
        activation: "silu", "gelu", "gelu_tanh", "relu", or None for gate as it is.
        power: 1 (Wanda-CoNNect) or 2.
        sq_norm: optional fp32 `[in]` that also receives sum x^2, so that x is read once.
    """
    checks.require_activations(gate, "gate")
    checks.require_activations(x)
    if gate.shape[:-1] != x.shape[:-1] or gate.dtype != x.dtype:
        raise ValueError(f"gate and x must match but for features, got {_brief(gate)} and {_brief(x)}")
    checks.require_accumulator(acc, (gate.shape[-1], x.shape[-1]))
    if sq_norm is not None:
        checks.require_accumulator(sq_norm, (x.shape[-1],), "sq_norm")
    for name, operand in {"gate": gate, "x": x, "sq_norm": sq_norm}.items():
        checks.require_same_device(name, operand, acc)
    checks.require_activation(activation)
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if x.numel() and gate.numel():
        call("add_coactivation_", acc, gate, x, activation, power, sq_norm, backend)


def add_hessian_(acc: Tensor, x: Tensor, backend: str = "auto") -> None:
    """acc[i, j] += sum over tokens of x[t, i] * x[t, j].

    Args:
        acc: fp32 `[in, in]`, symmetric, added to in place; both triangles are filled, and stay symmetric.
        x: fp32, fp16 or bf16 `[..., in]`; products are exact and sums fp32.
    Source: SparseGPT, arXiv 2301.00774, whose published code divides by the samples; no result depends on it.
    """
    checks.require_activations(x)
    checks.require_accumulator(acc, (x.shape[-1], x.shape[-1]))
    checks.require_same_device("x", x, acc)
    if x.numel():
        call("add_hessian_", acc, x, backend)


def add_gated_coactivation_(
    acc_gate: Tensor,
    acc_up: Tensor,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    activation: str | None = "silu",
    sq_norm: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """What the weights of a gated MLP, h = act(gate) * up, do to h: both projections in one read.

    acc_gate[i, j] += sum over tokens of (up[t, i] * act'(gate[t, i]))^2 * x[t, j]^2
    acc_up[i, j]   += sum over tokens of act(gate[t, i])^2 * x[t, j]^2

    Args:
        acc_gate, acc_up: fp32 `[out, in]`, added to in place.
        gate, up: `[..., out]`, the projections' outputs, gate before its activation; the same tokens as x.
        x: `[..., in]`, the input that both projections share, in the same dtype.
        activation: "silu", "gelu", "gelu_tanh", "relu"; or None where gate holds act(gate) already, and up
            holds up * act'(gate).
        sq_norm: optional fp32 `[in]` that also receives sum x^2, so that x is read once.
    Source: this project's `gated` method, derived in docs/gated.md.
    """
    checks.require_activations(gate, "gate")
    checks.require_activations(x)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate and up must match, got {_brief(gate)} and {_brief(up)}")
    if gate.shape[:-1] != x.shape[:-1] or gate.dtype != x.dtype:
        raise ValueError(f"gate and x must match but for features, got {_brief(gate)} and {_brief(x)}")
    checks.require_accumulator(acc_gate, (gate.shape[-1], x.shape[-1]), "acc_gate")
    checks.require_accumulator(acc_up, (gate.shape[-1], x.shape[-1]), "acc_up")
    if sq_norm is not None:
        checks.require_accumulator(sq_norm, (x.shape[-1],), "sq_norm")
    for name, operand in {"acc_up": acc_up, "gate": gate, "up": up, "x": x, "sq_norm": sq_norm}.items():
        checks.require_same_device(name, operand, acc_gate)
    checks.require_activation(activation)
    if x.numel() and gate.numel():
        call("add_gated_coactivation_", acc_gate, acc_up, gate, up, x, activation, sq_norm, backend)


def prune_rows_(
    weight: Tensor,
    scale: Tensor | None,
    num_pruned: int,
    mask: Tensor | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> None:
    """Zero the num_pruned lowest scores of each row. See the module for the arguments.

    Source: Wanda, arXiv 2306.11695, equation 1 and algorithm 1.
    """
    _check(weight, scale, mask)
    checks.require_count(num_pruned, weight.shape[1])
    if check_finite:
        checks.require_finite({"weight": weight, "scale": scale})
    if weight.numel():
        call("prune_rows_", weight, scale, num_pruned, mask, backend)


def prune_nm_(
    weight: Tensor,
    scale: Tensor | None,
    n: int,
    m: int,
    mask: Tensor | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> None:
    """Keep the n highest scores of every m consecutive columns (n kept of m, as NVIDIA), 1 <= n < m <= 32."""
    _check(weight, scale, mask)
    checks.require_nm(n, m, weight.shape[1])
    if check_finite:
        checks.require_finite({"weight": weight, "scale": scale})
    if weight.numel():
        call("prune_nm_", weight, scale, n, m, mask, backend)


def prune_matrix_(
    weight: Tensor,
    scale: Tensor | None,
    rank: int,
    mask: Tensor | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> None:
    """Zero every score at most the one at sorted position `rank` (0-based) of the whole matrix; ties go too.

    Source: the magnitude baseline of Wanda's published code.
    """
    _check(weight, scale, mask)
    if weight.numel() and not 0 <= rank < weight.numel():
        numel = weight.numel()
        raise ValueError(f"rank must be from 0 to {numel - 1} for {numel} weights, got {rank}")
    if check_finite:
        checks.require_finite({"weight": weight, "scale": scale})
    if weight.numel():
        call("prune_matrix_", weight, scale, rank, mask, backend)


def prune_variant_(
    weight: Tensor,
    scale: Tensor | None,
    ratio: float,
    mask: Tensor | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> Tensor:
    """The Wanda variant: in a row, prune where a score plus all lower ones is <= alpha * the row's sum.

    alpha is bisected in [0, 0.8] from 0.4 until the matrix's sparsity is within 0.001 of `ratio` or the
    interval is below 0.001. Sums are exact: a score counts as floor(score * 2^(bits - E)), E the exponent of
    the row's largest score and bits = `reference.fraction_bits(in)`, so every backend finds the same mask.
    Ties go together.

    Returns: alpha, fp64 scalar tensor on the weight's device.
    Source: Wanda, arXiv 2306.11695, appendix, and its published code.
    """
    _check(weight, scale, mask)
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    if not weight.numel():
        raise ValueError(f"weight is empty: {_brief(weight)}")
    if check_finite:
        checks.require_finite({"weight": weight, "scale": scale})
    return call("prune_variant_", weight, scale, ratio, mask, backend)


def sparsegpt_(
    weight: Tensor,
    factor: Factor,
    pattern: float | str | None,
    *,
    selector: str = "obs",
    scale: Tensor | None = None,
    pruned: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> None:
    """Prune in blocks of 128 columns, each weight to the right updated for every error on its left.

    Args:
        factor: of the Hessian of the inputs, from `factor_hessian`. Weights of dead inputs become 0 first.
        pattern: a ratio, for one threshold a block, which prunes its ties too, as published; or "n:m", chosen
            when the group is reached, in blocks of as many groups as fit 128; None where `pruned` is given.
        selector: what is pruned goes by, on the weights as the updates have left them. "obs": W^2 / U_jj^2;
            "wanda": abs(W) * sqrt(scale); "magnitude": abs(W).
        scale: fp32 `[in]`, for "wanda" alone.
        pruned: bool `[out, in]`: what goes is given; pattern, selector and scale are not used.

    fp32, each product, quotient and difference rounded; rounded to the weight's dtype once, at the end.
    Source: SparseGPT, arXiv 2301.00774, algorithm 1; the other selectors, Wanda's ablations.
    """
    _check(weight, scale, mask)
    checks.require_factor(factor.upper, factor.dead, weight)
    if pruned is not None:
        checks.require_pruned(pruned, weight)
        ratio, n, m, selector, scale = None, 0, 0, "magnitude", None
    else:
        ratio, n, m = _rule(pattern, weight.shape[1])
        scale = _scale_of_selector(selector, scale)
    if check_finite:
        checks.require_finite({"weight": weight, "scale": scale})
    if weight.numel():
        operands = (weight, factor.upper, factor.dead, ratio, n, m, selector, scale, pruned, mask)
        call("sparsegpt_", *operands, backend)


def _rule(pattern: float | str | None, in_features: int) -> tuple[float | None, int, int]:
    """(ratio, n, m) of a pattern; n = m = 0 for a ratio."""
    if isinstance(pattern, str):
        n, colon, m = pattern.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise ValueError(f"pattern must be a ratio or 'n:m', got {pattern!r}")
        checks.require_nm(int(n), int(m), in_features)
        return None, int(n), int(m)
    if pattern is None or not 0 <= pattern < 1:
        raise ValueError(f"pattern must be a ratio in [0, 1), or 'n:m', got {pattern!r}")
    return float(pattern), 0, 0


def _scale_of_selector(selector: str, scale: Tensor | None) -> Tensor | None:
    if selector not in SELECTORS:
        raise ValueError(f"unknown selector {selector!r}: choose {', '.join(SELECTORS)}")
    if selector != "wanda":
        return None
    if scale is None or scale.dim() != 1:
        got = "none" if scale is None else f"{list(scale.shape)}"
        raise ValueError(f"selector 'wanda' needs a scale [in], got {got}")
    return scale


def _check(weight: Tensor, scale: Tensor | None, mask: Tensor | None) -> None:
    checks.require_weight(weight)
    checks.require_scale(scale, weight)
    checks.require_mask(mask, weight)


def _brief(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
