"""A step of conjugate gradients behind its product: every row a system of its own.

z, residual, direction, product fp32 [n_rows, n_cols], pruned uint8, rho fp32 [n_rows], inverse_diagonal fp32
[n_cols]. `conjugate_gradients.py` has the formulas. A program takes a row in three passes, because the second
needs the sum of the first, the step length, and the third that of the second, the share of the old direction.
L2 holds the rows in progress, so DRAM is read once: 17 bytes a weight are read and 12 written; the roof is
copy bandwidth. Sums are fp32, in the same order on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.loops.conjugate_gradients import polish_by_steps_


@triton.jit
def _ratio(numerator, denominator):
    """numerator / denominator; 0 if the denominator is not positive."""
    positive = denominator > 0
    return tl.where(positive, tl.div_rn(numerator, tl.where(positive, denominator, 1.0)), 0.0)


@triton.jit
def _polish_kernel(
    z_ptr, residual_ptr, direction_ptr, product_ptr, pruned_ptr,
    rho_ptr,
    inverse_ptr,
    n_cols,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr, residual_ptr = z_ptr + row * n_cols, residual_ptr + row * n_cols
    direction_ptr, product_ptr = direction_ptr + row * n_cols, product_ptr + row * n_cols
    pruned_ptr += row * n_cols

    # 1. step length
    sums = tl.zeros((BLOCK,), tl.float32)
    for first_col in range(0, n_cols, BLOCK):
        offs = first_col + tl.arange(0, BLOCK)
        inside = offs < n_cols
        direction = tl.load(direction_ptr + offs, mask=inside, other=0.0)  # [BLOCK]
        sums += direction * tl.load(product_ptr + offs, mask=inside, other=0.0)
    rho = tl.load(rho_ptr + row)
    step = _ratio(rho, tl.sum(sums))

    # 2. solution and residual
    sums = tl.zeros((BLOCK,), tl.float32)
    for first_col in range(0, n_cols, BLOCK):
        offs = first_col + tl.arange(0, BLOCK)
        inside = offs < n_cols
        direction = tl.load(direction_ptr + offs, mask=inside, other=0.0)  # [BLOCK]
        z = tl.load(z_ptr + offs, mask=inside, other=0.0) + step * direction
        tl.store(z_ptr + offs, z, mask=inside)
        residual = tl.load(residual_ptr + offs, mask=inside, other=0.0)
        residual -= step * tl.load(product_ptr + offs, mask=inside, other=0.0)
        residual = tl.where(tl.load(pruned_ptr + offs, mask=inside, other=1) != 0, 0.0, residual)
        tl.store(residual_ptr + offs, residual, mask=inside)
        sums += residual * (residual * tl.load(inverse_ptr + offs, mask=inside, other=0.0))
    new = tl.sum(sums)
    share = _ratio(new, rho)

    # 3. direction
    tl.debug_barrier()  # other threads may have written what is read
    for first_col in range(0, n_cols, BLOCK):
        offs = first_col + tl.arange(0, BLOCK)
        inside = offs < n_cols
        preconditioned = tl.load(residual_ptr + offs, mask=inside, other=0.0)  # [BLOCK]
        preconditioned *= tl.load(inverse_ptr + offs, mask=inside, other=0.0)
        direction = preconditioned + share * tl.load(direction_ptr + offs, mask=inside, other=0.0)
        tl.store(direction_ptr + offs, direction, mask=inside)
    tl.store(rho_ptr + row, new)


def polish_step(
    z: Tensor,
    residual: Tensor,
    direction: Tensor,
    product: Tensor,
    rho: Tensor,
    inverse_diagonal: Tensor,
    pruned: Tensor,
) -> None:
    n_rows, n_cols = z.shape
    block = min(triton.next_power_of_2(max(n_cols, 128)), 1024)
    _polish_kernel[(n_rows,)](
        z, residual, direction, product, pruned.view(torch.uint8), rho, inverse_diagonal, n_cols,
        BLOCK=block, num_warps=max(block // 256, 1), enable_fp_fusion=False,
    )  # fmt: skip


def polish_(weight: Tensor, dense: Tensor, pruned: Tensor, hessian: Tensor, steps: int) -> None:
    polish_by_steps_(polish_step, weight, dense, pruned, hessian, steps)
