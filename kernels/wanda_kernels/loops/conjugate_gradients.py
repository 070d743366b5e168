"""Conjugate gradients on a fixed support, the same for every backend.

Every row solves (dense - z) H (dense - z)^T -> min over the z that are 0 where `pruned`: a system of its own,
with its own step lengths, preconditioned with the diagonal of H. One product serves all rows.

Each backend supplies one function. All operands are contiguous fp32, `[out, in]` but for `rho` `[out]` and
`inverse_diagonal` `[in]`; `pruned` is bool.

    polish_step(z, residual, direction, product, rho, inverse_diagonal, pruned)
        With product = direction H and rho = sum of residual^2 * inverse_diagonal of a row:
        step = rho / sum(direction * product), 0 if that sum is not positive
        z += step * direction
        residual -= step * product, where not pruned; there it stays 0
        new = sum(residual^2 * inverse_diagonal)
        direction = residual * inverse_diagonal + new / rho * direction; without the last term if rho is 0
        rho = new

Source: ALPS, arXiv 2406.07831, section 3.3, which has one step length for all rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def polish_by_steps_(
    polish_step: Callable[..., None],
    weight: Tensor,
    dense: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    steps: int,
) -> None:
    """Move the kept weights of `weight` towards the lowest error, in place; pruned ones become 0."""
    pruned = pruned.contiguous()
    z = weight.float().contiguous().masked_fill(pruned, 0.0)
    residual = ((dense.float() - z) @ hessian).masked_fill_(pruned, 0.0)
    inverse_diagonal = 1 / hessian.diagonal()
    direction = residual * inverse_diagonal
    rho = (residual * direction).sum(dim=1)
    product = torch.empty_like(direction)
    for _ in range(steps):
        torch.mm(direction, hessian, out=product)
        polish_step(z, residual, direction, product, rho, inverse_diagonal, pruned)
    weight.copy_(z)
