"""The factor of the inverse Hessian that SparseGPT works with: U upper triangular, (H + damp I)^-1 = U^T U.

Published: Cholesky, inverse, Cholesky again. Here one Cholesky of the flipped matrix and one triangular
inverse, n^3 / 3 and 2 n^3 / 3 FLOP: with J the exchange matrix, J H J = L L^T gives H = R R^T for the upper
R = J L J, and U = R^-1 = J L^-1 J.
Source: Frantar & Alistarh 2023, arXiv 2301.00774, section 3.3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wanda_kernels.dispatch import checks
from wanda_kernels.dispatch.precision import in_full_precision

LEAF_COLUMNS = 128  # of a triangular matrix that is inverted by substitution; larger ones by matmuls
ATTEMPTS = 4  # the dampening asked for, then ten times more, up to a thousand times


class NotPositiveDefiniteError(ValueError):
    """A Hessian that stays indefinite (or whose factor overflows) at every dampening tried."""


@dataclass(frozen=True)
class Factor:
    """What `sparsegpt_` needs of a Hessian.

    upper: fp32 `[in, in]`, contiguous, upper triangular.
    dead: bool `[in]`, inputs that were always zero: their weights go.
    dampening: the share of the mean diagonal that was added, larger than asked for where that failed.
    """

    upper: Tensor
    dead: Tensor
    dampening: float


@torch.no_grad()
@in_full_precision
def factor_hessian(hessian: Tensor, dampening: float = 0.01) -> Factor:
    """Factor the inverse of hessian + dampening * mean(diagonal) * I.

    Args:
        hessian: fp32 `[in, in]`, symmetric, from `add_hessian_`; not changed. At most two more matrices of
            its size are alive at a time. A dead input (0 on the diagonal) gets 1 there, as published.
        dampening: 0.01 as published; ten times more up to three times where the matrix is not positive
            definite, and `Factor.dampening` says which.

    Raises: `ValueError` on a Hessian that is not square fp32 or not finite, `NotPositiveDefiniteError` where
        no dampening helped.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != torch.float32:
        raise ValueError(f"hessian must be float32 [in, in], got {hessian.dtype} {list(hessian.shape)}")
    if not dampening > 0:
        raise ValueError(f"dampening must be positive, got {dampening}")
    checks.require_finite({"hessian": hessian})
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
    """U at this dampening; None where the matrix is not positive definite or U overflows."""
    flipped = hessian.flip(0, 1)
    diagonal = flipped.diagonal()
    diagonal.masked_fill_(dead.flip(0), 1.0)
    diagonal += (dampening * diagonal.double().mean()).float()  # an fp32 sum could overflow
    transposed, info = torch.linalg.cholesky_ex(flipped, upper=True)
    del flipped, diagonal
    if info.item():
        return None
    lower = transposed.mT  # LAPACK's factors have contiguous columns: these are rows
    _invert_lower_(lower, torch.eye(LEAF_COLUMNS, dtype=torch.float32, device=lower.device))
    upper = lower.flip(0, 1).contiguous()
    del lower, transposed
    lowest, highest = torch.aminmax(upper)
    usable = lowest.isfinite() & highest.isfinite() & (upper.diagonal() > 0).all()
    return upper if usable else None


def _invert_lower_(lower: Tensor, identity: Tensor) -> None:
    """Invert a lower triangular matrix in its place: [[A, 0], [B, C]] -> [[A', 0], [-C' B A', C']]."""
    n = len(lower)
    if n <= LEAF_COLUMNS:
        lower.copy_(torch.linalg.solve_triangular(lower, identity[:n, :n], upper=False))
        return
    half = (n // 2 + LEAF_COLUMNS - 1) // LEAF_COLUMNS * LEAF_COLUMNS
    a, b, c = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower_(a, identity)
    _invert_lower_(c, identity)
    b.addmm_(c, b @ a, beta=0, alpha=-1)
