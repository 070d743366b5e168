"""Products over the tokens of each expert: acc[e, i, j] += sum over expert e's tokens t of a[t, i] * b[t, j].

a [n_tokens, n_a], b [n_tokens, n_b] in one dtype, acc fp32 [experts, n_a, n_b]. A program computes one tile
of one expert's sum, and returns at once if the expert has no tokens. 2 * n_tokens * n_a * n_b FLOP on tensor
cores; acc is read and written once in every 16,384 tokens of an expert, 8 bytes an element, which is the roof
below about 1,000 tokens an expert. torch's grouped matmul has 16-bit results.
"""

import os

import triton
import triton.language as tl
from torch import Tensor, float32

from wanda_kernels.fp32_sums import MOST_TOKENS
from wanda_kernels.triton_ops.segments import segment

# the interpreter stores bf16 as integers and tl.dot would multiply those: interpreted operands stay fp32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def add_tile(acc_ptr, stride_am, tile, offs_m, offs_n, n_out, n_in):
    ptrs = acc_ptr + offs_m[:, None] * stride_am + offs_n[None, :]
    inside = (offs_m < n_out)[:, None] & (offs_n < n_in)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + tile, mask=inside)


@triton.jit
def _grouped_product_kernel(
    acc_ptr, stride_ae, stride_am,
    a_ptr, stride_at,
    b_ptr, stride_bt,
    offsets_ptr,  # [experts + 1]
    n_tokens, n_a, n_b,
    skipped, most,  # of an expert's tokens, the first ones that are skipped, and the most that are added
    UPPER: tl.constexpr,  # only the tiles that reach above the diagonal
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share an expert and GROUP_M bands of a, so these come from L2
    pid, expert = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(n_a, BLOCK_M), tl.cdiv(n_b, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    first_m = (group * GROUP_M + within % rows_in_group).to(tl.int64) * BLOCK_M
    first_n = (within // rows_in_group).to(tl.int64) * BLOCK_N
    if UPPER:
        if first_m >= first_n + BLOCK_N:
            return
    first, end = segment(offsets_ptr, expert, n_tokens)
    n_summed = tl.minimum(end - first - skipped, most)
    if n_summed <= 0:
        return

    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_offs = offs_m[:, None] + offs_k[None, :] * stride_at  # [BLOCK_M, BLOCK_K]
    b_offs = offs_k[:, None] * stride_bt + offs_n[None, :]  # [BLOCK_K, BLOCK_N]
    inside_m, inside_n = (first_m + offs_m < n_a)[:, None], (first_n + offs_n < n_b)[None, :]
    # cast: a stride of 1 is a constant, which has no .to
    stride_at, stride_bt = tl.cast(stride_at, tl.int64), tl.cast(stride_bt, tl.int64)
    a_ptr += first_m + (first + skipped) * stride_at
    b_ptr += first_n + (first + skipped) * stride_bt
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_summed, BLOCK_K):
        inside_k = offs_k < n_summed - start
        a = tl.load(a_ptr + a_offs, mask=inside_m & inside_k[None, :], other=0.0)
        b = tl.load(b_ptr + b_offs, mask=inside_k[:, None] & inside_n, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        tile = tl.dot(a, b, tile, input_precision="ieee")
        a_ptr += BLOCK_K * stride_at
        b_ptr += BLOCK_K * stride_bt

    # half a tile at a time: loading all of acc beside the tile would spill
    halves = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)  # [BLOCK_M, BLOCK_N // 2]
    acc_ptr += expert * tl.cast(stride_ae, tl.int64)
    rows, cols = first_m + offs_m, first_n + tl.arange(0, BLOCK_N // 2)
    add_tile(acc_ptr, stride_am, left, rows, cols, n_a, n_b)
    add_tile(acc_ptr, stride_am, right, rows, cols + BLOCK_N // 2, n_a, n_b)


def _block_sizes(a: Tensor, b: Tensor) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    if a.dtype == float32:
        return 64, 64, 32, 4, 2  # full precision is without tensor cores: sums and operands in registers
    if a.shape[1] * b.shape[1] <= 512 * 512:
        return 64, 64, 32, 4, 4  # narrow experts: less padding
    return 128, 256, 64, 8, 3  # 128 fp32 sums a thread; the most FLOP a byte of shared memory


def add_grouped_product_(acc: Tensor, a: Tensor, b: Tensor, offsets: Tensor, upper: bool = False) -> None:
    """acc[e] += a_e^T b_e for the rows a_e and b_e of each expert.

    Args:
        acc: fp32 `[experts, n_a, n_b]`, each expert's matrix contiguous.
        a, b: `[tokens, n_a]` and `[tokens, n_b]` in one dtype, rows contiguous.
        offsets: int32 or int64 `[experts + 1]`, contiguous.
        upper: leave the elements below the diagonal unspecified.
    """
    (n_tokens, n_a), n_b = a.shape, b.shape[1]
    block_m, block_n, block_k, num_warps, num_stages = _block_sizes(a, b)
    # the host does not know how many tokens an expert has: all of them at most
    for skipped in range(0, n_tokens, MOST_TOKENS):
        _grouped_product_kernel[(triton.cdiv(n_a, block_m) * triton.cdiv(n_b, block_n), len(acc))](
            acc, acc.stride(0), acc.stride(1), a, a.stride(0), b, b.stride(0), offsets, n_tokens, n_a, n_b,
            skipped, MOST_TOKENS, UPPER=upper, UPCAST=INTERPRETED,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=8,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
