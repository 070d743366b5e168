"""Column sums of squares: acc[j] += sum over tokens of x[t, j]^2.

x [n_tokens, n_cols], acc fp32 [n_cols]. Reads x once (2 bytes a 16-bit value) and writes partial sums, 4
bytes for each column and slab of tokens; the roof is read bandwidth. One launch: a ticket finds the last
program of a column tile to finish, which adds the slabs in a fixed order. The shape alone decides the slabs:
the same bits on every run and every GPU. Relative error: about 2^-24 * (4 + log2 of the tokens), since all
terms are positive. With offsets, a slab has consecutive tokens; its program writes one row of partial sums
for each expert with tokens in it, at most n_slabs + experts rows in all, and a second launch adds them.
Source: Wanda, arXiv 2306.11695, section 3.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.native.ops import as_rows
from wanda_kernels.triton_ops.segments import segment

# enough programs at 2048 tokens; partial sums stay small beyond 32,768 tokens
TOKENS_PER_SLAB, MOST_SLABS = 128, 256


@triton.jit(do_not_specialize=["n_slabs"])
def _sq_norm_kernel(
    acc_ptr,
    x_ptr, stride_xm,
    partial_ptr,  # fp32 [n_slabs, n_cols]
    tickets_ptr,  # int32 [column tiles], zero between launches
    n_tokens, n_cols, n_slabs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n_cols
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(slab * (BLOCK_M * LOADS), n_tokens, n_slabs * (BLOCK_M * LOADS)):
        # all loads are issued before the first is used
        tiles = ()
        for i in tl.static_range(LOADS):
            tokens = start + i * BLOCK_M + tl.arange(0, BLOCK_M)
            x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_xm + cols[None, :]
            tiles += (tl.load(x_ptrs, mask=(tokens < n_tokens)[:, None] & inside[None, :], other=0.0),)
        for i in tl.static_range(LOADS):
            x = tiles[i].to(tl.float32)
            sums += x * x  # [BLOCK_M, BLOCK_N]
    tl.store(partial_ptr + slab.to(tl.int64) * n_cols + cols, tl.sum(sums, axis=0), mask=inside)

    # every thread must have written its sums before one draws the ticket
    tl.debug_barrier()
    if tl.atomic_add(tickets_ptr + tl.program_id(0), 1, sem="acq_rel") == n_slabs - 1:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, n_slabs, BLOCK_M):
            slabs = start + tl.arange(0, BLOCK_M)
            partial_ptrs = partial_ptr + slabs[:, None] * n_cols + cols[None, :]
            there = (slabs < n_slabs)[:, None] & inside[None, :]
            total += tl.load(partial_ptrs, mask=there, other=0.0, cache_modifier=".cg")
        acc = tl.load(acc_ptr + cols, mask=inside)
        tl.store(acc_ptr + cols, acc + tl.sum(total, axis=0), mask=inside)
        tl.store(tickets_ptr + tl.program_id(0), 0)


@triton.jit
def _sq_norm_total_kernel(
    acc_ptr,
    partial_ptr,  # fp32 [n_slabs, n_cols]
    n_slabs, n_cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n_cols
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_slabs, BLOCK_M):
        slabs = start + tl.arange(0, BLOCK_M)
        partial_ptrs = partial_ptr + slabs[:, None] * n_cols + cols[None, :]
        sums += tl.load(partial_ptrs, mask=(slabs < n_slabs)[:, None] & inside[None, :], other=0.0)
    acc = tl.load(acc_ptr + cols, mask=inside)
    tl.store(acc_ptr + cols, acc + tl.sum(sums, axis=0), mask=inside)


def slabs(n_tokens: int) -> tuple[int, int]:
    """(number of slabs, tokens in each) of a sum over n_tokens: by shape alone, so that bits repeat."""
    slab_tokens = TOKENS_PER_SLAB * triton.cdiv(n_tokens, TOKENS_PER_SLAB * MOST_SLABS)
    return triton.cdiv(n_tokens, slab_tokens), slab_tokens


def add_total_(acc: Tensor, partial: Tensor) -> None:
    """acc += partial.sum(0), in a fixed order."""
    n_slabs, n_cols = partial.shape
    grid = (triton.cdiv(n_cols, 64),)
    _sq_norm_total_kernel[grid](acc, partial, n_slabs, n_cols, BLOCK_M=32, BLOCK_N=64, num_warps=4)


# 32 x 128 on 4 warps: four 16-byte loads a thread, for two tiles at once; the best of a sweep on an H100
TILE = {"BLOCK_M": 32, "BLOCK_N": 128, "LOADS": 2, "num_warps": 4}
PROGRAMS = 528  # 4 for each of an H100's 132 multiprocessors, all resident at once


def _n_slabs(n_tokens: int, n_cols: int) -> int:
    """By shape alone. A slab takes every n_slabs-th group of tokens, so that all have about as many."""
    most = min(max(PROGRAMS // triton.cdiv(n_cols, TILE["BLOCK_N"]), 1), MOST_SLABS)
    return min(triton.cdiv(n_tokens, TILE["BLOCK_M"] * TILE["LOADS"]), most)


@cache
def _tickets(device: torch.device, stream: int, size: int) -> Tensor:
    """Zeros, which every launch resets to zero; launches of one stream run one after the other."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def _tickets_for(x: Tensor, n_tiles: int) -> Tensor:
    if not x.is_cuda:
        return torch.zeros(n_tiles, dtype=torch.int32, device=x.device)
    size = triton.next_power_of_2(max(n_tiles, 256))
    # a CUDA graph may be replayed on any stream
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=x.device)
    return _tickets(x.device, torch.cuda.current_stream(x.device).cuda_stream, size)


@triton.jit
def _segment_sums_kernel(
    x_ptr, stride_xm,
    offsets_ptr,  # [n_experts + 1]
    partial_ptr,  # fp32 [n_slabs + n_experts, n_cols]
    n_tokens, n_cols, n_experts, slab_tokens,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slab_first, slab_end = slab * slab_tokens, tl.minimum((slab + 1) * slab_tokens, n_tokens)
    # from the first expert that ends behind the slab's first token to the last that begins before its end
    experts = tl.arange(0, BLOCK_E)
    firsts = tl.load(offsets_ptr + experts, mask=experts < n_experts, other=n_tokens)
    ends = tl.load(offsets_ptr + 1 + experts, mask=experts < n_experts, other=n_tokens)
    first_expert = tl.sum((ends <= slab_first).to(tl.int32))
    for expert in range(first_expert, tl.sum((firsts < slab_end).to(tl.int32))):
        first, end = segment(offsets_ptr, expert, n_tokens)
        first, end = tl.maximum(first, slab_first), tl.minimum(end, slab_end)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(first, end, BLOCK_M):
            tokens = start + tl.arange(0, BLOCK_M)
            x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_xm + cols[None, :]
            x = tl.load(x_ptrs, mask=(tokens < end)[:, None] & (cols < n_cols)[None, :], other=0.0)
            x = x.to(tl.float32)
            sums += x * x  # [BLOCK_M, BLOCK_N]
        # slab + expert grows with every further pair of a slab and an expert that has tokens in it
        row = (slab + expert).to(tl.int64)
        inside = (cols < n_cols) & (first < end)
        tl.store(partial_ptr + row * n_cols + cols, tl.sum(sums, axis=0), mask=inside)


@triton.jit
def _segment_totals_kernel(
    acc_ptr, stride_ae,
    offsets_ptr,  # [n_experts + 1]
    partial_ptr,  # fp32 [n_slabs + n_experts, n_cols]
    n_tokens, n_cols, slab_tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    first, end = segment(offsets_ptr, expert, n_tokens)
    if first >= end:
        return
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n_cols
    first_slab, end_slab = first // slab_tokens, (end - 1) // slab_tokens + 1
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first_slab, end_slab, BLOCK_M):
        slabs = start + tl.arange(0, BLOCK_M)
        partial_ptrs = partial_ptr + (slabs + expert).to(tl.int64)[:, None] * n_cols + cols[None, :]
        sums += tl.load(partial_ptrs, mask=(slabs < end_slab)[:, None] & inside[None, :], other=0.0)
    acc_ptrs = acc_ptr + expert * tl.cast(stride_ae, tl.int64) + cols
    tl.store(acc_ptrs, tl.load(acc_ptrs, mask=inside) + tl.sum(sums, axis=0), mask=inside)


def _add_segments_(acc: Tensor, x: Tensor, offsets: Tensor) -> None:
    """acc [experts, n_cols]; x is cut into slabs whatever the offsets are, which the host does not know."""
    (n_tokens, n_cols), n_experts = x.shape, len(acc)
    n_slabs, slab_tokens = slabs(n_tokens)
    partial = torch.empty(n_slabs + n_experts, n_cols, dtype=torch.float32, device=x.device)
    _segment_sums_kernel[(triton.cdiv(n_cols, 128), n_slabs)](
        x, x.stride(0), offsets, partial, n_tokens, n_cols, n_experts, slab_tokens,
        BLOCK_E=triton.next_power_of_2(n_experts), BLOCK_M=32, BLOCK_N=128, num_warps=4,
    )  # fmt: skip
    _segment_totals_kernel[(triton.cdiv(n_cols, 128), n_experts)](
        acc,
        acc.stride(0),
        offsets,
        partial,
        n_tokens,
        n_cols,
        slab_tokens,
        BLOCK_M=4,
        BLOCK_N=128,
        num_warps=4,
    )


def add_sq_norm_(acc: Tensor, x: Tensor, offsets: Tensor | None = None) -> None:
    x = as_rows(x)
    if offsets is not None:
        _add_segments_(acc, x, offsets)
        return
    n_tokens, n_cols = x.shape
    n_slabs, n_tiles = _n_slabs(n_tokens, n_cols), triton.cdiv(n_cols, TILE["BLOCK_N"])
    partial = torch.empty(n_slabs, n_cols, dtype=torch.float32, device=x.device)
    _sq_norm_kernel[(n_tiles, n_slabs)](
        acc, x, x.stride(0), partial, _tickets_for(x, n_tiles), n_tokens, n_cols, n_slabs, **TILE
    )
