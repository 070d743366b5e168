"""SparseGPT: prune, and update the kept weights to make up for the pruned ones."""

from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.backends import call_on_rows, run
from wanda_kernels.hessian_factor import Factor
from wanda_kernels.loops.joint_threshold import SumRows
from wanda_kernels.loops.sparsegpt import SELECTORS


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
    sum_rows: SumRows | None = None,
) -> None:
    """Prune in blocks of 128 columns, and update the weights to the right of each pruned one, in place.

    Columns go from left to right. With e = W[i, j] / U[j, j] for a pruned weight, every W[i, k] to its right
    becomes W[i, k] - e * U[j, k]. Arithmetic is fp32 with every product, quotient and difference rounded;
    the result is rounded to the weight's dtype once, at the end.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]`, of any strides that do not overlap; unless its rows are
            contiguous, a copy is pruned and copied back. Pruned weights become +0.0, kept ones change.
        factor: of the Hessian of the inputs, from `factor_hessian`, on the weight's device. Weights of dead
            inputs become 0 first.
        pattern: which weights to prune, by the scores of the weights as updated so far. A ratio in [0, 1):
            of each block, every score at most the one at sorted position int(weights * ratio), as published;
            all ties are pruned. "n:m": all but the n highest of every m columns, chosen at the group's first
            column; ties prune the lower column first, and a block is as many whole groups as fit in 128
            columns. None: `pruned` says which.
        selector: the score. "obs": W^2 / U[j, j]^2; "wanda": abs(W) * sqrt(scale); "magnitude": abs(W).
        scale: fp32 `[in]`, not negative, for selector "wanda"; other selectors do not use it.
        pruned: optional bool `[out, in]`, rows contiguous: exactly these weights are pruned; pattern,
            selector and scale are then not used.
        mask: optional uint8 `[out, ceil(in / 8)]`, contiguous, that receives the packed mask: bit j % 8 of
            byte j // 8 is 1 where column j was kept (see `unpack_bits`).
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`. All choose and update alike, to the
            bit, within a block; matmuls between blocks may differ in the last bits.
        check_finite: refuse NaN, infinities and negative scales, which waits for a GPU; False if the caller
            has checked (`require_finite`).
        sum_rows: if other processes hold further rows of the weight: adds a small tensor up over all of
            them, which call this at the same time. A ratio's thresholds are then those of all rows.

    Raises: `ValueError` on wrong shapes, dtypes, devices, patterns or selectors, and on values that
        check_finite refuses, with the numbers; `BackendError` if the named backend cannot serve. The weight
        is then unchanged.
    Source: SparseGPT, arXiv 2301.00774, algorithm 1, and its published code; the other selectors are
        ablations of Wanda, arXiv 2306.11695.
    """
    checks.require_selection(weight, scale, mask)
    checks.require_factor(factor.upper, factor.dead, weight)
    if pruned is not None:
        checks.require_pruned(pruned, weight)
        ratio, n, m, selector, scale = None, 0, 0, "magnitude", None
    else:
        ratio, n, m = _rule(pattern, weight.shape[1])
        scale = _scale_of_selector(selector, scale)
    if check_finite:
        checks.require_finite_operands(weight, scale)
    operands = (weight, factor.upper, factor.dead, ratio, n, m, selector, scale, pruned, mask)
    if ratio is not None and sum_rows is not None:
        call_on_rows("sparsegpt_", *operands, sum_rows, backend, by=run)
    elif weight.numel():
        call_on_rows("sparsegpt_", *operands, backend)


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
