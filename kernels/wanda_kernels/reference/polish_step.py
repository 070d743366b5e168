"""A step of conjugate gradients in plain torch. `conjugate_gradients.py` documents the arguments."""

import torch
from torch import Tensor

from wanda_kernels.loops.conjugate_gradients import polish_by_steps_


def polish_(weight: Tensor, dense: Tensor, pruned: Tensor, hessian: Tensor, steps: int) -> None:
    polish_by_steps_(polish_step, weight, dense, pruned, hessian, steps)


def polish_step(
    z: Tensor,
    residual: Tensor,
    direction: Tensor,
    product: Tensor,
    rho: Tensor,
    inverse_diagonal: Tensor,
    pruned: Tensor,
) -> None:
    curvature = (direction * product).sum(dim=1)
    step = torch.where(curvature > 0, rho / curvature, 0.0)[:, None]
    z += step * direction
    residual.copy_(torch.where(pruned, 0.0, residual - step * product))
    preconditioned = residual * inverse_diagonal
    new = (residual * preconditioned).sum(dim=1)
    share = torch.where(rho > 0, new / rho, 0.0)[:, None]
    direction.copy_(preconditioned + share * direction)
    rho.copy_(new)
