"""Solvers of the layer error tr((W - V) H (W - V)^T), H the Hessian of the inputs: mask descent, conjugate
gradients, and the step of ADMM that comes after its product.
"""

import torch
from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.backends import call


def refine_mask_(
    weight: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    pattern: str | None,
    sweeps: int = 3,
    *,
    backend: str = "auto",
    check_finite: bool = True,
) -> None:
    """Lower the error of a mask by exchanging pruned and kept weights, in place. Weights do not change.

    The error of a row is r H r^T, where r has the row's pruned weights and 0 elsewhere. A sweep goes through
    the columns from left to right. "n:m": each group of m gets the best of its C(m, n) masks, all others
    fixed; where these are more than 70, the best swaps of a kept and a pruned weight. None: in each block of
    128 columns the best swaps, until none lowers the error, so that a row keeps its number of weights. A
    mask changes only for one that is strictly better. Arithmetic within a block is fp32 with every product
    and sum rounded.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]`, dense: its values at pruned weights count.
        pruned: bool `[out, in]`, rows contiguous, True for pruned weights; changed in place.
        hessian: fp32 `[in, in]`, symmetric, contiguous, of the inputs.
        pattern: "n:m", n kept of every m columns, which `pruned` must obey; None for any other mask.
        sweeps: the most sweeps; fewer if one changes nothing.
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`. All choose alike, to the bit,
            within a block; the product before each block may differ in its last bits.
        check_finite: refuse NaN and infinities, which waits for a GPU; False if the caller has checked.

    Raises: `ValueError` on wrong shapes, dtypes, devices, patterns or counts, with the numbers;
        `BackendError` if the named backend cannot serve. Nothing is then changed.
    Source: coordinate descent on masks; its swaps are those of SparseSwaps, arXiv 2512.10922.
    """
    n, m = _require_solvable(weight, pruned, hessian, pattern, check_finite)
    _require_steps("sweeps", sweeps)
    if m and weight.numel():
        _require_groups(pruned, n, m)
    if weight.numel() and sweeps:
        call("refine_mask_", weight, pruned, hessian, n, m, sweeps, backend)


def polish_(
    weight: Tensor,
    dense: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    steps: int = 10,
    *,
    backend: str = "auto",
    check_finite: bool = True,
) -> None:
    """Lower the error of the kept weights by conjugate gradients on the fixed support, in place.

    Every row is a linear system of its own, preconditioned with the Hessian's diagonal; a step is one product
    for all rows. Products and sums are fp32; the result is rounded to the weight's dtype once, at the end.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]`: where the steps begin. Pruned weights become
            +0.0, kept ones change.
        dense: `[out, in]` of any of these dtypes: the weights W before pruning.
        pruned: bool `[out, in]`, rows contiguous, True for pruned weights.
        hessian: fp32 `[in, in]`, symmetric, positive definite (`damped_hessian`), contiguous.
        steps: of conjugate gradients; 0 changes no kept weight.
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`. Sums may differ in their last bits.
        check_finite: refuse NaN and infinities, which waits for a GPU; False if the caller has checked.

    Raises: `ValueError` on wrong shapes, dtypes, devices or counts, with the numbers; `BackendError` if the
        named backend cannot serve. The weight is then unchanged.
    Source: ALPS, arXiv 2406.07831, section 3.3.
    """
    _require_solvable(weight, pruned, hessian, None, check_finite)
    _require_steps("steps", steps)
    if dense.shape != weight.shape or dense.dtype not in checks.DTYPES:
        got = f"{dense.dtype} {list(dense.shape)}"
        raise ValueError(f"dense must be float {list(weight.shape)}, the shape of weight, got {got}")
    checks.require_same_device("dense", dense, weight)
    if check_finite and weight.numel():
        checks.require_finite({"dense": dense})
        _require_positive_diagonal(hessian)
    if weight.numel():
        call("polish_", weight, dense, pruned, hessian, steps, backend)


def admm_step_(
    primal: Tensor,
    dual: Tensor,
    dense: Tensor,
    pruned: Tensor,
    pattern: int | str,
    ratio: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Project to the pattern and update the dual, in place; `admm_` computes the product before it.

    With u = primal + dual: `pruned` marks the lowest abs(u) of each row or group, z is u with those at 0, and

        dual = ratio * (u - z)        primal = (dense - z) + dual

    The new primal is the operand of the next product. All of this is fp32 with each operation rounded.

    Args:
        primal: fp32 `[out, in]`, contiguous: the product's result. Overwritten.
        dual: fp32 `[out, in]`, contiguous: the dual variable over rho. Overwritten.
        dense: fp32 `[out, in]`, contiguous: the weights W.
        pruned: bool `[out, in]`, contiguous: the support of the step before. Overwritten.
        pattern: how many weights of each row are pruned, or "n:m". Ties prune the lower column first.
        ratio: rho over the rho of the next step.
        backend: "auto", "torch", "triton" or "cpu"; see `choose_backend`. All give the same bits.

    Returns: the number of elements of `pruned` that changed, int64 `[]` on the device.
    Raises: `ValueError` on wrong shapes, dtypes, devices or patterns; `BackendError` if the named backend
        cannot serve. Nothing is then changed.
    Source: ALPS, arXiv 2406.07831, equation 5, with the dual scaled by rho.
    """
    if primal.dim() != 2 or primal.dtype != torch.float32 or not primal.is_contiguous():
        raise ValueError(
            f"primal must be contiguous float32 [out, in], got {primal.dtype} {list(primal.shape)}"
        )
    for name, tensor in (("dual", dual), ("dense", dense)):
        checks.require_like(name, tensor, primal)
    checks.require_pruned(pruned, primal)
    if not pruned.is_contiguous():
        raise ValueError(f"pruned must be contiguous, got strides {list(pruned.stride())}")
    num_pruned, n, m = pattern_numbers(pattern, primal.shape[1])
    if not primal.numel():
        return torch.zeros((), dtype=torch.int64, device=primal.device)
    return call("admm_step_", primal, dual, dense, pruned, num_pruned, n, m, ratio, backend)


def pattern_numbers(pattern: int | str, in_features: int) -> tuple[int, int, int]:
    """(num_pruned, n, m) of a pattern: n = m = 0 for a number of pruned weights a row."""
    if not isinstance(pattern, str):
        checks.require_count(pattern, in_features)
        return pattern, 0, 0
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal()):
        raise ValueError(f"pattern must be 'n:m', got {pattern!r}")
    checks.require_nm(int(n), int(m), in_features)
    return 0, int(n), int(m)


def _require_solvable(
    weight: Tensor, pruned: Tensor, hessian: Tensor, pattern: str | None, check_finite: bool
) -> tuple[int, int]:
    """Check the operands that the solvers share. Returns n and m; 0 and 0 for no groups."""
    checks.require_selection(weight, None, None)
    checks.require_pruned(pruned, weight)
    checks.require_hessian(hessian, weight)
    _, n, m = pattern_numbers(0 if pattern is None else pattern, weight.shape[1])
    if check_finite:
        checks.require_finite({"weight": weight, "hessian": hessian})
    return n, m


def _require_groups(pruned: Tensor, n: int, m: int) -> None:
    counts = pruned.unflatten(1, (-1, m)).sum(dim=2)
    wrong = (counts != m - n).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        place = f"{counts[row, group].item()} of columns {group * m} to {group * m + m - 1} of row {row}"
        raise ValueError(f"pruned must mark {m - n} of every {m} columns for {n}:{m}, but marks {place}")


def _require_positive_diagonal(hessian: Tensor) -> None:
    not_positive = (hessian.diagonal() <= 0).nonzero()
    if len(not_positive):
        column = int(not_positive[0])
        value = hessian[column, column].item()
        raise ValueError(f"hessian's diagonal must be positive, got {value:g} at {column}")


def _require_steps(name: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"{name} must be at least 0, got {count}")
