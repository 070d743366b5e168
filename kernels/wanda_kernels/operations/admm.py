"""ADMM for one weight: the solver that finds mask and weights of the lowest layer error together.

With s = sqrt(diag H), the problem is scaled to w' = w s and H' = H / (s s^T), so that abs(w') is a weight's
error if it alone is pruned. An iteration solves for dense weights B, projects to the pattern (Z), and updates
the scaled dual Y:

    B = (H' + rho I)^-1 (H' w' + rho (Z - Y)) = w' - rho (w' - Z + Y) (H' + rho I)^-1
    Z = P(B + Y);    Y = B + Y - Z

rho rises along a ladder; each rung is one inverse, which all weights that read the same input share. Steps of
conjugate gradients on the final support follow (`polish_`).
Source: ALPS, arXiv 2406.07831; Boza, arXiv 2401.02938. The published rho rises by a tenth to a third after
every 3 iterations, with an eigendecomposition in fp64. Here it rises by 1.4 after every 4, until the support
settles: about 30 iterations and 8 inverses reach the same error within 1% (tests/wanda_kernels/test_admm.py).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.precision import in_full_precision, tf32_on_gpus
from wanda_kernels.hessian_factor import NotPositiveDefiniteError
from wanda_kernels.loops.joint_threshold import SumRows
from wanda_kernels.mask_bits import pack_bits
from wanda_kernels.operations.solver import admm_step_, pattern_numbers, polish_

RHO, GROWTH, RUNGS = 0.1, 1.4, 12
STEPS = 4  # on each rung
# Share of the kept weights. A last step on a rung that changes fewer ends the iterations.
SETTLED = 1e-3
POLISH_STEPS = 4


def damped_hessian(hessian: Tensor, dampening: float = 0.01) -> Tensor:
    """A copy of the Hessian with dampening * mean(diagonal) added to the diagonal; 1 first for dead inputs.

    Args:
        hessian: fp32 `[in, in]`, symmetric, from `add_hessian_`.
        dampening: share of the mean diagonal, positive.
    Returns: fp32 `[in, in]`, positive definite up to rounding.
    Raises: `ValueError` if the Hessian is not square fp32 or not finite, or dampening is not positive.
    Source: SparseGPT's published code.
    """
    checks.require_dampable(hessian, dampening)
    damped = hessian.clone(memory_format=torch.contiguous_format)
    diagonal = damped.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1.0)
    # an fp32 sum could overflow
    diagonal += (dampening * diagonal.double().mean()).float()
    return damped


@dataclass
class Ladder:
    """The Hessian of one input as ADMM uses it, with its inverses for the rungs of rho, each made once.

    Attributes:
        hessian: fp32 `[in, in]`, damped.
        keep: keep the inverses for other weights that read the same input.
    """

    hessian: Tensor
    keep: bool = True
    _inverses: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.scale = self.hessian.diagonal().sqrt()

    def rho(self, rung: int) -> float:
        return RHO * GROWTH**rung

    @in_full_precision
    def inverse(self, rung: int) -> Tensor:
        """(H' + rho I)^-1, fp32 `[in, in]`.

        Raises: `NotPositiveDefiniteError` if rounding or the Hessian leaves it without a Cholesky factor.
        """
        if rung not in self._inverses:
            scaled = self.hessian / self.scale / self.scale[:, None]
            scaled.diagonal().add_(self.rho(rung))
            factor, info = torch.linalg.cholesky_ex(scaled)
            if info.item():
                size = f"{len(scaled)} x {len(scaled)}"
                raise NotPositiveDefiniteError(
                    f"the {size} Hessian is not positive definite, even with rho = {self.rho(rung):g} added"
                )
            inverse = torch.cholesky_inverse(factor)
            if not self.keep:
                return inverse
            self._inverses[rung] = inverse
        return self._inverses[rung]


@torch.no_grad()
@in_full_precision
def admm_(
    weight: Tensor,
    ladder: Ladder,
    pattern: float | str,
    *,
    polish: int = POLISH_STEPS,
    mask: Tensor | None = None,
    backend: str = "auto",
    check_finite: bool = True,
    sum_rows: SumRows | None = None,
) -> int:
    """Prune to the pattern and solve for the kept weights, in place.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]`. Pruned weights become +0.0, kept ones change.
        ladder: of the damped Hessian of the inputs.
        pattern: a ratio in [0, 1): each row loses int(in * ratio) weights; or "n:m".
        polish: steps of conjugate gradients at the end.
        mask: optional uint8 `[out, ceil(in / 8)]`, contiguous, that receives the packed mask.
        backend: of `admm_step_` and `polish_`.
        check_finite: refuse NaN and infinities in the weight; False if the caller has checked.
        sum_rows: as in `sparsegpt_`: the support settles when that of all rows does.
    Returns: the number of iterations.
    Raises: `NotPositiveDefiniteError`; `ValueError` on wrong operands. The weight is then unchanged.
    Source: ALPS, arXiv 2406.07831, algorithm 1.
    """
    pattern = _require_operands(weight, ladder, pattern, mask)
    if check_finite:
        checks.require_finite_operands(weight, None)
    dense = weight.float()
    w = (dense * ladder.scale).contiguous()
    pruned = torch.zeros_like(w, dtype=torch.bool)
    dual, product = torch.zeros_like(w), w.clone()
    admm_step_(product, dual, w, pruned, pattern, 0.0, backend=backend)
    sum_rows = sum_rows or _alone
    kept = sum_rows(pruned.numel() - pruned.sum())
    operand, product, iterations = product, torch.empty_like(w), 0
    for rung in range(RUNGS):
        inverse = ladder.inverse(rung)
        for step in range(STEPS):
            # The projection forgives operands of 11 bits, and of 8: the error changes by at most 0.3%.
            with tf32_on_gpus():
                torch.addmm(w, operand, inverse, alpha=-ladder.rho(rung), out=product)
            ratio = 1 / GROWTH if step + 1 == STEPS else 1.0
            changed = admm_step_(product, dual, w, pruned, pattern, ratio, backend=backend)
            operand, product = product, operand
        iterations += STEPS
        if sum_rows(changed) <= SETTLED * kept:
            break
    # On the support the dual is 0, so the operand is w - z there.
    solved = ((w - operand) / ladder.scale).masked_fill_(pruned, 0.0)
    polish_(solved, dense, pruned, ladder.hessian, polish, backend=backend, check_finite=False)
    weight.copy_(solved)
    if mask is not None:
        mask.copy_(pack_bits(~pruned))
    return iterations


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _require_operands(weight: Tensor, ladder: Ladder, pattern: float | str, mask: Tensor | None) -> int | str:
    """Check the operands before the work. Returns the pattern as `admm_step_` takes it."""
    checks.require_selection(weight, None, mask)
    checks.require_hessian(ladder.hessian, weight)
    if isinstance(pattern, str):
        pattern_numbers(pattern, weight.shape[1])
    elif 0 <= pattern < 1:
        pattern = int(weight.shape[1] * pattern)
    else:
        raise ValueError(f"pattern must be a ratio in [0, 1), or 'n:m', got {pattern!r}")
    return pattern
