"""One step of ADMM behind its product: project each row or group to its pattern, and update the dual.

primal, dual, dense fp32 [n_rows, n_cols], pruned uint8. With u = primal + dual, the lowest abs(u) are pruned,
ties the lower column first, and z is u with those at 0:

    dual = ratio * (u - z)        primal = (dense - z) + dual

Reads 13 bytes a weight and writes 9; the roof is copy bandwidth. A program takes a row, or columns of one if
the pattern is n:m. prune_rows.py has the search for a row's threshold: the keys stay in registers, and the
operands are read again, from L2, once the threshold is known. Of a row too long for the registers, u replaces
primal and is read at every pass. Each program adds its count of changes to the total: integers, the same on
every run.
Source: ALPS, arXiv 2406.07831, equation 5.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.triton_ops.nm_groups import kept_by_extraction
from wanda_kernels.triton_ops.prune_rows import (
    IN_PARTS,
    IN_PARTS_WARPS,
    SEGMENTS,
    threshold_in_memory,
    threshold_in_registers,
)
from wanda_kernels.triton_ops.score_keys import NO_SCALE, highest_key, keys_of


@triton.jit
def _keys_at(primal_ptr, dual_ptr, offs, n_cols):
    """Keys of abs(u), from primal and dual."""
    inside = offs < n_cols
    u = tl.load(primal_ptr + offs, mask=inside, other=0.0) + tl.load(dual_ptr + offs, mask=inside, other=0.0)
    return keys_of(u, u, inside, NO_SCALE)


@triton.jit
def _update(primal_ptrs, dual_ptrs, dense_ptrs, pruned_ptrs, u, pruned, ratio, inside):
    """Write the step's results. Returns where `pruned` has changed, int32."""
    dual = tl.where(pruned, u * ratio, 0.0)
    primal = (tl.load(dense_ptrs, mask=inside, other=0.0) - tl.where(pruned, 0.0, u)) + dual
    changed = pruned != (tl.load(pruned_ptrs, mask=inside, other=0) != 0)
    tl.store(dual_ptrs, dual, mask=inside)
    tl.store(primal_ptrs, primal, mask=inside)
    tl.store(pruned_ptrs, pruned.to(tl.uint8), mask=inside)
    return (changed & inside).to(tl.int32)


@triton.jit(do_not_specialize=["num_pruned"])
def _admm_rows_kernel(
    primal_ptr, dual_ptr, dense_ptr, pruned_ptr,
    changed_ptr,  # int64 []
    n_cols, num_pruned, ratio,
    IN_REGISTERS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * n_cols
    primal_ptr, dual_ptr, dense_ptr = primal_ptr + first, dual_ptr + first, dense_ptr + first
    pruned_ptr += first

    # 1. the row's threshold
    if IN_REGISTERS:
        k0 = _keys_at(primal_ptr, dual_ptr, tl.arange(0, B0), n_cols)  # [B0]
        k1, k2 = k0, k0
        lowest, highest = tl.min(k0), highest_key(k0)
        if B1 > 0:
            k1 = _keys_at(primal_ptr, dual_ptr, B0 + tl.arange(0, B1), n_cols)  # [B1]
            lowest, highest = tl.minimum(lowest, tl.min(k1)), tl.maximum(highest, highest_key(k1))
        if B2 > 0:
            k2 = _keys_at(primal_ptr, dual_ptr, B0 + B1 + tl.arange(0, B2), n_cols)  # [B2]
            lowest, highest = tl.minimum(lowest, tl.min(k2)), tl.maximum(highest, highest_key(k2))
        key, tie_end = threshold_in_registers(k0, k1, k2, lowest, highest, n_cols, num_pruned, B0, B1, B2)
    else:
        for first_col in range(0, n_cols, BLOCK):
            offs = first_col + tl.arange(0, BLOCK)
            u = tl.load(primal_ptr + offs, mask=offs < n_cols) + tl.load(dual_ptr + offs, mask=offs < n_cols)
            tl.store(primal_ptr + offs, u, mask=offs < n_cols)
        tl.debug_barrier()  # other threads read it
        key, tie_end = threshold_in_memory(
            primal_ptr, 1, primal_ptr, n_cols, num_pruned, False, NO_SCALE, BLOCK
        )

    # 2. the results
    count = tl.zeros((BLOCK,), tl.int32)
    for first_col in range(0, n_cols, BLOCK):
        offs = first_col + tl.arange(0, BLOCK)
        inside = offs < n_cols
        u = tl.load(primal_ptr + offs, mask=inside, other=0.0)  # [BLOCK]
        if IN_REGISTERS:
            u += tl.load(dual_ptr + offs, mask=inside, other=0.0)
        keys = keys_of(u, u, inside, NO_SCALE)
        pruned = (keys < key) | ((keys == key) & (offs < tie_end))
        count += _update(
            primal_ptr + offs, dual_ptr + offs, dense_ptr + offs, pruned_ptr + offs, u, pruned, ratio, inside
        )
    tl.atomic_add(changed_ptr, tl.sum(count).to(tl.int64), sem="relaxed")


@triton.jit
def _admm_groups_kernel(
    primal_ptr, dual_ptr, dense_ptr, pruned_ptr,
    changed_ptr,  # int64 []
    n_cols, ratio,
    N_PRUNED: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr,  # GROUP: m or the power of two above
    BLOCK: tl.constexpr,
):  # fmt: skip
    slots = tl.arange(0, BLOCK)
    cols = tl.program_id(1) * (BLOCK // GROUP * M)
    # neighbouring slots are neighbours in memory: the compiler does not see it in the general form
    cols += slots if GROUP == M else slots // GROUP * M + slots % GROUP  # [BLOCK]
    inside = (cols < n_cols) & (slots % GROUP < M)
    offs = tl.program_id(0).to(tl.int64) * n_cols + cols
    u = tl.load(primal_ptr + offs, mask=inside, other=0.0) + tl.load(dual_ptr + offs, mask=inside, other=0.0)
    keys = keys_of(u, u, inside, NO_SCALE)
    pruned = kept_by_extraction(keys, N_PRUNED, M, BLOCK, GROUP) == 0
    changed = _update(
        primal_ptr + offs, dual_ptr + offs, dense_ptr + offs, pruned_ptr + offs, u, pruned, ratio, inside
    )
    tl.atomic_add(changed_ptr, tl.sum(changed).to(tl.int64), sem="relaxed")


def _row_tile(n_cols: int) -> dict[str, int | bool]:
    """Segments of a row's keys, and the columns that are written at a time."""
    for most_cols, (b0, b1, b2), num_warps in SEGMENTS:
        if n_cols <= most_cols:
            block = min(b0, 128 * num_warps)  # 4 columns a thread: a 16-byte access
            segments = {"IN_REGISTERS": True, "B0": b0, "B1": b1, "B2": b2}
            return segments | {"BLOCK": block, "num_warps": num_warps}
    segments = {"IN_REGISTERS": False, "B0": 0, "B1": 0, "B2": 0}
    return segments | {"BLOCK": IN_PARTS, "num_warps": IN_PARTS_WARPS}


GROUPS_BLOCK = 1024  # 8 columns a thread of 4 warps, each a 64-bit place for the extraction


def admm_step_(
    primal: Tensor, dual: Tensor, dense: Tensor, pruned: Tensor, num_pruned: int, n: int, m: int, ratio: float
) -> Tensor:
    n_rows, n_cols = primal.shape
    changed = torch.zeros((), dtype=torch.int64, device=primal.device)
    operands = primal, dual, dense, pruned.view(torch.uint8), changed, n_cols
    if m:
        group = triton.next_power_of_2(m)
        grid = (n_rows, triton.cdiv(n_cols // m, GROUPS_BLOCK // group))
        _admm_groups_kernel[grid](
            *operands, ratio,
            N_PRUNED=m - n, M=m, GROUP=group, BLOCK=GROUPS_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        _admm_rows_kernel[(n_rows,)](
            *operands, num_pruned, ratio, **_row_tile(n_cols), enable_fp_fusion=False
        )
    return changed
