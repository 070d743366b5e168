"""Mask descent on a GPU: torch's product before each block, Triton within it."""

from torch import Tensor

from wanda_kernels.loops.mask_descent import refine_in_blocks_
from wanda_kernels.triton_ops.refine_groups import refine_groups
from wanda_kernels.triton_ops.refine_swaps import refine_swaps


def refine_mask_(weight: Tensor, pruned: Tensor, hessian: Tensor, n: int, m: int, sweeps: int) -> None:
    refine_in_blocks_(refine_groups, refine_swaps, weight, pruned, hessian, n, m, sweeps)
