"""Mask descent in plain torch. `mask_descent.py` documents the functions of a block."""

from torch import Tensor

from wanda_kernels.loops.mask_descent import refine_in_blocks_
from wanda_kernels.reference.refine_groups import refine_groups
from wanda_kernels.reference.refine_swaps import refine_swaps


def refine_mask_(weight: Tensor, pruned: Tensor, hessian: Tensor, n: int, m: int, sweeps: int) -> None:
    refine_in_blocks_(refine_groups, refine_swaps, weight, pruned, hessian, n, m, sweeps)
