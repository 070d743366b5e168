"""Zero the weights with the lowest scores, in place. A weight's score is abs(W) * sqrt(scale) in fp32."""

from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.backends import call, call_on_rows


def prune_rows_(
    weight: Tensor,
    scale: Tensor | None,
    num_pruned: int,
    mask: Tensor | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> None:
    """Zero the num_pruned lowest scores of each row, in place; ties prune the lower column first.

    The score of a weight is abs(W[i, j]) * sqrt(scale[j]), or scale[i, j], in fp32 with one rounding each. A
    stack of experts is pruned in one call, each expert as if it were alone.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]` or `[experts, out, in]`, of any strides that do not overlap,
            such as transposed storage. Pruned weights become +0.0; kept ones keep their bits.
        scale: the statistic under the root, fp32, not negative; None for abs(W) alone. `[in]` or `[out, in]`;
            for a stack `[experts, in]`, one row for each expert, or `[experts, out, in]`.
        num_pruned: weights to zero in each row, from 0 to in.
        mask: optional uint8 `[out, ceil(in / 8)]` or `[experts, out, ceil(in / 8)]`, contiguous, that
            receives the packed mask: bit j % 8 of byte j // 8 is 1 where column j was kept (see
            `unpack_bits`).
        backend: "auto", "torch", "triton", "cuda" or "cpu"; see `choose_backend`. All give the same bits.
        check_finite: refuse NaN, infinities and negative scales, which waits for a GPU; False if the caller
            has checked (`require_finite`).

    Raises: `ValueError` on wrong shapes, dtypes, devices or counts, and on values that check_finite refuses,
        with the numbers; `BackendError` if the named backend cannot serve. The weight is then unchanged.
    Source: Wanda, arXiv 2306.11695, equation 1 and algorithm 1.
    """
    checks.require_selection(weight, scale, mask, takes_stacks=True)
    checks.require_count(num_pruned, weight.shape[-1])
    if check_finite:
        checks.require_finite_operands(weight, scale)
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
    """Keep the n highest scores of every m consecutive columns, in place; ties prune the lower column first.

    n:m counts kept weights, as NVIDIA does. The score of a weight is abs(W[i, j]) * sqrt(scale[j]), or
    scale[i, j], in fp32 with one rounding each. A stack of experts is pruned in one call, each expert as if
    it were alone.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]` or `[experts, out, in]`, in a multiple of m, of any strides
            that do not overlap, such as transposed storage. Pruned weights become +0.0; kept ones keep their
            bits.
        scale: the statistic under the root, fp32, not negative; None for abs(W) alone. `[in]` or `[out, in]`;
            for a stack `[experts, in]`, one row for each expert, or `[experts, out, in]`.
        n, m: weights to keep of every m columns, 1 <= n < m <= 32.
        mask: optional uint8 `[out, ceil(in / 8)]` or `[experts, out, ceil(in / 8)]`, contiguous, that
            receives the packed mask: bit j % 8 of byte j // 8 is 1 where column j was kept (see
            `unpack_bits`).
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`. All give the same bits.
        check_finite: refuse NaN, infinities and negative scales, which waits for a GPU; False if the caller
            has checked (`require_finite`).

    Raises: `ValueError` on wrong shapes, dtypes, devices or n:m, and on values that check_finite refuses,
        with the numbers; `BackendError` if the named backend cannot serve. The weight is then unchanged.
    Source: Wanda, arXiv 2306.11695, section 3 (structured N:M sparsity).
    """
    checks.require_selection(weight, scale, mask, takes_stacks=True)
    checks.require_nm(n, m, weight.shape[-1])
    if check_finite:
        checks.require_finite_operands(weight, scale)
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
    """Zero every score at most the one at sorted position `rank` of the matrix, in place; all ties are
    pruned.

    The score of a weight is abs(W[i, j]) * sqrt(scale[j]), or scale[i, j], in fp32 with one rounding each.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]`, of any strides that do not overlap; unless its rows are
            contiguous, a copy is pruned and copied back. Pruned weights become +0.0; kept ones keep their
            bits.
        scale: the statistic under the root, fp32 `[in]` or `[out, in]`, not negative; None for abs(W) alone.
        rank: position in the ascending order of all out * in scores, from 0; rank + 1 weights or, with ties,
            more are pruned.
        mask: optional uint8 `[out, ceil(in / 8)]`, contiguous, that receives the packed mask: bit j % 8 of
            byte j // 8 is 1 where column j was kept (see `unpack_bits`).
        backend: "auto", "torch", "triton", "cuda" or "cpu"; see `choose_backend`. All give the same bits.
        check_finite: refuse NaN, infinities and negative scales, which waits for a GPU; False if the caller
            has checked (`require_finite`).

    Raises: `ValueError` on wrong shapes, dtypes, devices or rank, and on values that check_finite refuses,
        with the numbers; `BackendError` if the named backend cannot serve. The weight is then unchanged.
    Source: the magnitude baseline of Wanda's published code.
    """
    checks.require_selection(weight, scale, mask)
    checks.require_rank(rank, weight.numel())
    if check_finite:
        checks.require_finite_operands(weight, scale)
    if weight.numel():
        call_on_rows("prune_matrix_", weight, scale, rank, mask, backend)


def prune_variant_(
    weight: Tensor,
    scale: Tensor | None,
    ratio: float,
    mask: Tensor | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> Tensor:
    """Wanda's variant, in place: prune a score where it and all lower ones of its row sum to <= alpha * the
    sum.

    alpha is bisected in [0, 0.8] from 0.4 until the matrix's sparsity is within 0.001 of `ratio` or the
    interval is below 0.001. Sums are exact: a score counts as floor(score * 2^(bits - E)), where E is the
    exponent of the row's largest score and bits = min(36, 53 - ceil(log2(in))), so every backend finds the
    same alpha and mask. Equal scores of a row are pruned together or not at all. The score of a weight is
    abs(W[i, j]) * sqrt(scale[j]), or scale[i, j], in fp32 with one rounding each.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]`, not empty, of any strides that do not overlap; unless its rows
            are contiguous, a copy is pruned and copied back. Pruned weights become +0.0; kept ones keep their
            bits.
        scale: the statistic under the root, fp32 `[in]` or `[out, in]`, not negative; None for abs(W) alone.
        ratio: the wanted fraction of zeros, in [0, 1).
        mask: optional uint8 `[out, ceil(in / 8)]`, contiguous, that receives the packed mask: bit j % 8 of
            byte j // 8 is 1 where column j was kept (see `unpack_bits`).
        backend: "auto", "torch", "cuda" or "cpu"; see `choose_backend`. All give the same bits.
        check_finite: refuse NaN, infinities and negative scales, which waits for a GPU; False if the caller
            has checked (`require_finite`).

    Returns: alpha, an fp64 scalar tensor on the weight's device.
    Raises: `ValueError` on wrong shapes, dtypes, devices or ratio, and on values that check_finite refuses,
        with the numbers; `BackendError` if the named backend cannot serve. The weight is then unchanged.
    Source: Wanda, arXiv 2306.11695, appendix, and its published code.
    """
    checks.require_selection(weight, scale, mask)
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    if not weight.numel():
        raise ValueError(f"weight is empty: {weight.dtype} {list(weight.shape)}")
    if check_finite:
        checks.require_finite_operands(weight, scale)
    return call_on_rows("prune_variant_", weight, scale, ratio, mask, backend)
