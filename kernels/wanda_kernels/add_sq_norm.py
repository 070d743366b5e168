"""Column sums of squares: acc[j] += sum over tokens of x[t, j]^2.

x [n_tokens, n_cols], acc fp32 [n_cols]. Reads x once (2 bytes a 16-bit value) and writes partial sums, 4
bytes a column for every 128 tokens; the roof is read bandwidth. Two stages and no atomics, cut by shape
alone: the same bits on every run and every GPU. Error: about 2^-24 * (4 + log2 of the tokens) relative,
since all terms are positive.
Source: Wanda, arXiv 2306.11695, section 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.native import as_rows

TOKENS_PER_SLAB, MOST_SLABS = (
    128,
    256,
)  # enough programs at 2048 tokens; partial sums stay small beyond 32,768


@triton.jit
def _sq_norm_slabs_kernel(
    x_ptr, stride_xm,
    partial_ptr,  # fp32 [slabs, n_cols]
    n_tokens, n_cols, slab_tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n_cols
    first, end = slab * slab_tokens, tl.minimum((slab + 1) * slab_tokens, n_tokens)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        x_ptrs = x_ptr + tokens[:, None] * stride_xm + cols[None, :]
        x = tl.load(x_ptrs, mask=(tokens < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += x * x  # [BLOCK_M, BLOCK_N]
    tl.store(partial_ptr + slab * n_cols + cols, tl.sum(sums, axis=0), mask=inside)


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
    """(slabs, tokens in each) that a sum over n_tokens is cut into: by shape alone, so that bits repeat."""
    slab_tokens = TOKENS_PER_SLAB * triton.cdiv(n_tokens, TOKENS_PER_SLAB * MOST_SLABS)
    return triton.cdiv(n_tokens, slab_tokens), slab_tokens


def add_total_(acc: Tensor, partial: Tensor) -> None:
    """acc += partial.sum(0), in a fixed order."""
    n_slabs, n_cols = partial.shape
    grid = (triton.cdiv(n_cols, 64),)
    _sq_norm_total_kernel[grid](acc, partial, n_slabs, n_cols, BLOCK_M=32, BLOCK_N=64, num_warps=4)


def add_sq_norm_(acc: Tensor, x: Tensor) -> None:
    x = as_rows(x)
    n_tokens, n_cols = x.shape
    n_slabs, slab_tokens = slabs(n_tokens)
    partial = torch.empty(n_slabs, n_cols, dtype=torch.float32, device=x.device)
    # 32 x 128 on 4 warps: four 16-byte loads a thread under way, 32 sums in registers
    _sq_norm_slabs_kernel[(triton.cdiv(n_cols, 128), n_slabs)](
        x, x.stride(0), partial, n_tokens, n_cols, slab_tokens, BLOCK_M=32, BLOCK_N=128, num_warps=4
    )
    add_total_(acc, partial)
