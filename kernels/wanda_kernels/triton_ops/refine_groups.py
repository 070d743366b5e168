"""The best mask of each group of m columns of a block, all candidates tried.

w fp32 [n_rows, n_cols <= 128], pruned uint8 in place, h fp32 [n_cols, n_cols], c fp32 [n_rows, n_cols].
`reference/refine_groups.py` has the formulas and defines the bits, so there is no fused multiply-add. A lane
takes a row: lanes exchange nothing, and h is the same for all of them. The reference adds a group's change to
all columns behind the group. Here a group sums the changes of all groups before it, when its turn comes, in
the same order: changes are written once, to a workspace [n_cols, n_rows] that a warp reads coalesced.
Reads 9 bytes a weight from DRAM and writes 1. The bound is a row's chain: n_cols^2 / 2 products and sums for
the changes, and for each group the errors of its candidates. 4096 rows are 128 warps, so that most of a GPU's
schedulers have one or none.
Groups of up to 8 columns stay in registers, with their candidates unrolled: those are in lexicographic order,
so a candidate takes over the sums of the leading columns that it shares with the one before it. Wider groups,
such as 10:12 or 1:16, keep their terms in the workspace.
"""

from functools import cache
from math import comb

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.triton_ops.nm_groups import columns_from


@triton.constexpr_function
def _pruned_columns(candidate, n_pruned, m):
    """As candidates_of(m - n_pruned, m)[candidate], in Python that kernels may call as they compile."""
    columns = list(range(n_pruned))
    for _ in range(candidate):
        # the last column that can move to the right does, and those behind it follow
        last = max([a for a in range(n_pruned) if columns[a] < m - n_pruned + a])
        columns[last:] = range(columns[last] + 1, columns[last] + 1 + n_pruned - last)
    return columns


@triton.constexpr_function
def _column(candidate, a, n_pruned, m):
    return _pruned_columns(candidate, n_pruned, m)[a]


@triton.constexpr_function
def _bits(candidate, n_pruned, m):
    """The pruned columns of a candidate as the bits of a signed 32-bit integer."""
    bits = sum([1 << column for column in _pruned_columns(candidate, n_pruned, m)])
    return bits - (1 << 32) if bits >> 31 else bits


@triton.constexpr_function
def _n_shared(candidate, n_pruned, m):
    """How many leading columns a candidate shares with the one before it."""
    if candidate == 0:
        return 0
    columns, before = _pruned_columns(candidate, n_pruned, m), _pruned_columns(candidate - 1, n_pruned, m)
    return min([a for a in range(n_pruned) if columns[a] != before[a]])


@triton.jit
def _add_column(
    total, alone, pairs, CANDIDATE: tl.constexpr, A: tl.constexpr, N_PRUNED: tl.constexpr, M: tl.constexpr
):
    """The sum of a candidate's error with its A-th column, after `total` of those before it."""
    i: tl.constexpr = _column(CANDIDATE, A, N_PRUNED, M)
    total += alone[i]
    for b in tl.static_range(A):
        total += pairs[i * (i - 1) // 2 + _column(CANDIDATE, b, N_PRUNED, M)]
    return total


@triton.jit
def _error_sums(sums, alone, pairs, CANDIDATE: tl.constexpr, N_PRUNED: tl.constexpr, M: tl.constexpr):
    """A candidate's error after 0, 1, ..., N_PRUNED columns; `sums` are those of the candidate before it."""
    n_shared: tl.constexpr = _n_shared(CANDIDATE, N_PRUNED, M)
    sums = columns_from(sums, 0, 1, n_shared + 1)
    for a in tl.static_range(n_shared, N_PRUNED):
        sums += (_add_column(sums[a], alone, pairs, CANDIDATE, a, N_PRUNED, M),)
    return sums


@triton.jit
def _compare(error, bits, now, error_now, lowest, best):
    """(error of the mask `now`, lowest error, its mask) after one candidate more."""
    better = error < lowest
    error_now = tl.where(now == bits, error, error_now)
    return error_now, tl.where(better, error, lowest), tl.where(better, bits, best)


@triton.jit
def _refine_groups_kernel(
    w_ptr, stride_wm,
    pruned_ptr, stride_pm,
    c_ptr, stride_cm,
    h_ptr, stride_hm,
    added_ptr,  # fp32 [n_cols, n_rows]
    n_rows, n_cols,
    N_CANDIDATES: tl.constexpr, N_PRUNED: tl.constexpr,
    M: tl.constexpr, GROUP: tl.constexpr,  # GROUP: m or the power of two above
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    w_ptrs, c_ptrs = w_ptr + rows * stride_wm, c_ptr + rows * stride_cm
    slots = tl.arange(0, GROUP)[None, :]
    pruned_ptrs = pruned_ptr + rows[:, None] * stride_pm + slots  # [BLOCK_M, GROUP]
    pruned_inside = inside[:, None] & (slots < M)
    added_ptrs = added_ptr + rows
    for first in range(0, n_cols, M):
        h_ptrs = h_ptr + first * (stride_hm + 1)  # the group's piece of h
        # 1. c without the group's own weights, and with the changes before it
        w, c, removed = (), (), ()
        pruned = tl.load(pruned_ptrs + first, mask=pruned_inside, other=0).to(tl.int32)
        now = tl.sum(pruned << slots, axis=1)  # a bit a column
        for i in tl.static_range(M):
            w += (tl.load(w_ptrs + first + i, mask=inside, other=0.0),)  # [BLOCK_M]
            c += (tl.load(c_ptrs + first + i, mask=inside, other=0.0),)
            removed += (tl.where(((now >> i) & 1) != 0, w[i], 0.0),)
        for k in range(first):
            added = tl.load(added_ptrs + k * n_rows, mask=inside, other=0.0)
            sums = ()
            for i in tl.static_range(M):
                sums += (c[i] + added * tl.load(h_ptr + k * stride_hm + first + i),)
            c = sums
        for k in tl.static_range(M):
            sums = ()
            for i in tl.static_range(M):
                sums += (c[i] - removed[k] * tl.load(h_ptrs + k * stride_hm + i),)
            c = sums

        # 2. the terms of an error
        alone, pairs = (), ()
        for i in tl.static_range(M):
            square = (w[i] * w[i]) * tl.load(h_ptrs + i * (stride_hm + 1))
            alone += ((2 * w[i]) * c[i] + square,)
            if N_PRUNED > 1:
                for j in tl.static_range(i):
                    pairs += (((2 * w[j]) * w[i]) * tl.load(h_ptrs + j * stride_hm + i),)

        # 3. the lowest error, of equal ones the first
        lowest = tl.full((BLOCK_M,), float("inf"), tl.float32)
        error_now, best, sums = lowest, now, (tl.zeros((BLOCK_M,), tl.float32),)
        for candidate in tl.static_range(N_CANDIDATES):
            sums = _error_sums(sums, alone, pairs, candidate, N_PRUNED, M)
            bits = _bits(candidate, N_PRUNED, M)
            error_now, lowest, best = _compare(sums[N_PRUNED], bits, now, error_now, lowest, best)
        now = tl.where(lowest < error_now, best, now)
        tl.store(pruned_ptrs + first, ((now[:, None] >> slots) & 1).to(tl.uint8), mask=pruned_inside)
        for i in tl.static_range(M):
            added = tl.where(((now >> i) & 1) != 0, w[i], 0.0) - removed[i]
            tl.store(added_ptrs + (first + i) * n_rows, added, mask=inside)
        tl.debug_barrier()  # before other threads read them


@triton.jit
def _term_error(bits, w_ptrs, alone_ptrs, n_rows, h_ptr, stride_hm, m, inside):
    """The error of a candidate, with the group's terms in memory."""
    total = tl.zeros(inside.shape, tl.float32)
    for i in range(m):
        if (bits >> i) & 1:
            total += tl.load(alone_ptrs + i * n_rows, mask=inside, other=0.0)
            w = tl.load(w_ptrs + i, mask=inside, other=0.0)
            for j in range(i):
                if (bits >> j) & 1:
                    twice = 2 * tl.load(w_ptrs + j, mask=inside, other=0.0)
                    total += (twice * w) * tl.load(h_ptr + j * stride_hm + i)
    return total


@triton.jit
def _refine_large_groups_kernel(
    w_ptr, stride_wm,
    pruned_ptr, stride_pm,
    c_ptr, stride_cm,
    h_ptr, stride_hm,
    added_ptr,  # fp32 [n_cols, n_rows]
    candidates_ptr,  # int32 [n_candidates]
    n_rows, n_cols, m, n_candidates,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    for first in range(0, n_cols, m):
        w_ptrs, c_ptrs = w_ptr + rows * stride_wm + first, c_ptr + rows * stride_cm + first
        pruned_ptrs, added_ptrs = pruned_ptr + rows * stride_pm + first, added_ptr + rows + first * n_rows
        h_ptrs = h_ptr + first * (stride_hm + 1)
        now = tl.zeros((BLOCK_M,), tl.int32)
        for i in range(m):
            now |= tl.load(pruned_ptrs + i, mask=inside, other=0).to(tl.int32) << i
        for i in range(m):
            c = tl.load(c_ptrs + i, mask=inside, other=0.0)
            for k in range(first):
                added = tl.load(added_ptr + rows + k * n_rows, mask=inside, other=0.0)
                c += added * tl.load(h_ptr + k * stride_hm + first + i)
            for k in range(m):
                removed = tl.where(((now >> k) & 1) != 0, tl.load(w_ptrs + k, mask=inside, other=0.0), 0.0)
                c -= removed * tl.load(h_ptrs + k * stride_hm + i)
            w = tl.load(w_ptrs + i, mask=inside, other=0.0)
            alone = (2 * w) * c + (w * w) * tl.load(h_ptrs + i * (stride_hm + 1))
            tl.store(added_ptrs + i * n_rows, alone, mask=inside)
        tl.debug_barrier()

        lowest = tl.full((BLOCK_M,), float("inf"), tl.float32)
        error_now, best = lowest, now
        for candidate in range(n_candidates):
            bits = tl.load(candidates_ptr + candidate)
            error = _term_error(bits, w_ptrs, added_ptrs, n_rows, h_ptrs, stride_hm, m, inside)
            error_now, lowest, best = _compare(error, bits, now, error_now, lowest, best)
        chosen = tl.where(lowest < error_now, best, now)
        tl.debug_barrier()
        for i in range(m):
            w = tl.load(w_ptrs + i, mask=inside, other=0.0)
            tl.store(pruned_ptrs + i, ((chosen >> i) & 1).to(tl.uint8), mask=inside)
            removed = tl.where(((now >> i) & 1) != 0, w, 0.0)
            added = tl.where(((chosen >> i) & 1) != 0, w, 0.0) - removed
            tl.store(added_ptrs + i * n_rows, added, mask=inside)
        tl.debug_barrier()


ROWS = 32  # of a program: one warp, a row a lane
UNROLLED = 8  # columns of a group at most; groups of 12 would take 15 s to compile, of 32 minutes


@cache
def _candidates(n: int, m: int, device: torch.device) -> Tensor:
    bits = [_bits(candidate, m - n, m) for candidate in range(comb(m, n))]
    return torch.tensor(bits, dtype=torch.int32, device=device)


def refine_groups(w: Tensor, pruned: Tensor, c: Tensor, h: Tensor, n: int, m: int) -> None:
    n_rows, n_cols = w.shape
    added = torch.empty(n_cols, n_rows, dtype=torch.float32, device=w.device)
    matrices = w, w.stride(0), pruned.view(torch.uint8), pruned.stride(0), c, c.stride(0), h, h.stride(0)
    grid = (triton.cdiv(n_rows, ROWS),)
    flags = {"BLOCK_M": ROWS, "num_warps": 1, "enable_fp_fusion": False}
    if m <= UNROLLED:
        flags |= {"N_CANDIDATES": comb(m, n), "N_PRUNED": m - n, "M": m, "GROUP": triton.next_power_of_2(m)}
        _refine_groups_kernel[grid](*matrices, added, n_rows, n_cols, **flags)
    else:
        candidates = _candidates(n, m, w.device)
        sizes = n_rows, n_cols, m, len(candidates)
        _refine_large_groups_kernel[grid](*matrices, added, candidates, *sizes, **flags)
