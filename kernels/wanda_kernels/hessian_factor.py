"""The factor of the inverse Hessian that SparseGPT uses: U upper triangular, (H + damp I)^-1 = U^T U.

The published code computes a Cholesky factor, an inverse, and another Cholesky factor. This code computes one
Cholesky factor of the flipped matrix and one triangular inverse, n^3 / 3 and 2 n^3 / 3 FLOP: with J the
exchange matrix, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, and U = R^-1 = J L^-1 J.
Source: Frantar & Alistarh 2023, arXiv 2301.00774, section 3.3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.precision import in_full_precision

LEAF_COLUMNS = 128  # triangular matrices up to this size are inverted by substitution, larger ones by matmuls
ATTEMPTS = 4  # the given dampening, then 10, 100 and 1000 times it


class NotPositiveDefiniteError(ValueError):
    """The Hessian is not positive definite, or its factor overflows, at every dampening tried."""


@dataclass(frozen=True)
class Factor:
    """The factor of a damped inverse Hessian, (H + damp I)^-1 = U^T U, as `sparsegpt_` takes it.

    Attributes:
        upper: U, fp32 `[in, in]`, contiguous, upper triangular.
        dead: bool `[in]`, True for inputs that were zero in every token; `sparsegpt_` prunes their weights.
        dampening: the share of the mean diagonal that was added; more than requested if that did not suffice.
    """

    upper: Tensor
    dead: Tensor
    dampening: float


@torch.no_grad()
@in_full_precision
def factor_hessian(hessian: Tensor, dampening: float = 0.01) -> Factor:
    """Factor the inverse of hessian + dampening * mean(diagonal) * I.

    Args:
        hessian: fp32 `[in, in]`, symmetric, finite, from `add_hessian_`, on any device; not changed. At most
            two more matrices of its size are alive at a time. A dead input (0 on the diagonal) gets 1 there,
            as published.
        dampening: share of the mean diagonal to add, positive; 0.01 as published. While the matrix is not
            positive definite, it is raised tenfold, at most three times.

    Returns: the factor, on the Hessian's device; `Factor.dampening` is the one that served.
    Raises: `ValueError` if the Hessian is not square fp32 or not finite, or dampening is not positive;
        `NotPositiveDefiniteError` if no dampening tried served.
    Source: SparseGPT, arXiv 2301.00774, section 3.3 and its published code.
    """
    checks.require_dampable(hessian, dampening)
    dead = hessian.diagonal() == 0
    for attempt in range(ATTEMPTS):
        tried = dampening * 10**attempt
        upper = _factor(hessian, dead, tried)
        if upper is not None:
            return Factor(upper, dead, tried)
    diagonal = hessian.diagonal()
    raise NotPositiveDefiniteError(
        f"the {len(hessian)} x {len(hessian)} Hessian is not positive definite, even with {tried:g} of its"
        f" mean diagonal added: diagonal from {diagonal.min().item():g} to {diagonal.max().item():g},"
        f" {int(dead.sum())} dead inputs"
    )


def _factor(hessian: Tensor, dead: Tensor, dampening: float) -> Tensor | None:
    """U at this dampening; None if the matrix is not positive definite or U overflows."""
    flipped = hessian.flip(0, 1)
    diagonal = flipped.diagonal()
    diagonal.masked_fill_(dead.flip(0), 1.0)
    # an fp32 sum could overflow
    diagonal += (dampening * diagonal.double().mean()).float()
    transposed, info = torch.linalg.cholesky_ex(flipped, upper=True)
    del flipped, diagonal
    if info.item():
        return None
    # LAPACK's factors have contiguous columns, so the transpose has contiguous rows
    lower = transposed.mT
    _invert_lower_(lower, torch.eye(LEAF_COLUMNS, dtype=torch.float32, device=lower.device))
    upper = lower.flip(0, 1).contiguous()
    del lower, transposed
    lowest, highest = torch.aminmax(upper)
    usable = lowest.isfinite() & highest.isfinite() & (upper.diagonal() > 0).all()
    return upper if usable else None


def _invert_lower_(lower: Tensor, identity: Tensor) -> None:
    """Invert a lower triangular matrix in place: [[A, 0], [B, C]] -> [[A', 0], [-C' B A', C']]."""
    n = len(lower)
    if n <= LEAF_COLUMNS:
        lower.copy_(torch.linalg.solve_triangular(lower, identity[:n, :n], upper=False))
        return
    half = (n // 2 + LEAF_COLUMNS - 1) // LEAF_COLUMNS * LEAF_COLUMNS
    a, b, c = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower_(a, identity)
    _invert_lower_(c, identity)
    b.addmm_(c, b @ a, beta=0, alpha=-1)
