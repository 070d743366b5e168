"""Hessian of a linear's squared output error: acc[i, j] += sum over tokens of x[t, i] * x[t, j].

x [n_tokens, n_cols], acc fp32 [n_cols, n_cols], symmetric. n_tokens * n_cols^2 FLOP on tensor cores, half of
a general matmul's, because the result is symmetric; the roof is the matmul rate. acc is read and written once
in every 16,384 tokens, 8 bytes an element, and mirrored once a call, 4 bytes more. Products of 16-bit values
are exact in fp32.
Two paths. "symmetric": a Triton matmul of the tiles that reach above the diagonal. "addmm": cuBLAS adds the
whole product to acc; the only path for fp32, in full precision. Both then copy the upper triangle to the
lower one. With offsets, a grouped Triton matmul computes the tiles that reach above each expert's diagonal.
Each element is added to once in 16,384 tokens: the same bits on every run.
Source: Frantar & Alistarh 2023, arXiv 2301.00774, section 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.fp32_sums import MOST_TOKENS, add_product_, addmm_adds_to_fp32
from wanda_kernels.native.ops import as_rows
from wanda_kernels.triton_ops.grouped_product import INTERPRETED, add_grouped_product_, add_tile
from wanda_kernels.triton_ops.segments import segment

# compute capability at least, in features at least, path; the first row that fits. Estimates: half the tiles,
# at some 95 % (sm_80) or 70 % (sm_90; measured: 87 %) of cuBLAS's rate, in whole waves
PATHS = (
    ((9, 0), 8192, "symmetric"),
    # at 4096 features, 272 tiles take 3 waves on 132 multiprocessors; cuBLAS's 512 tiles take 4 faster ones
    ((9, 0), 0, "addmm"),
    ((8, 0), 2048, "symmetric"),
    # fewer tiles than an A100 has multiprocessors: cuBLAS splits the tokens
    ((8, 0), 0, "addmm"),
)
BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64  # 128 fp32 sums a thread; the most FLOP a byte of shared memory


@triton.jit
def _hessian_kernel(
    acc_ptr, stride_am,
    x_ptr, stride_xt,
    n_tokens, n_cols,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share GROUP_M bands of x, so these come from L2
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(n_cols, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    first_m = (group * GROUP_M + within % rows_in_group).to(tl.int64) * BLOCK_M
    first_n = (within // rows_in_group).to(tl.int64) * BLOCK_N
    if first_m >= first_n + BLOCK_N:
        return  # below the diagonal

    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    left_offs = offs_m[:, None] + offs_k[None, :] * stride_xt  # [BLOCK_M, BLOCK_K]
    right_offs = offs_k[:, None] * stride_xt + offs_n[None, :]  # [BLOCK_K, BLOCK_N]
    inside_m, inside_n = (first_m + offs_m < n_cols)[:, None], (first_n + offs_n < n_cols)[None, :]
    left_ptr, right_ptr = x_ptr + first_m, x_ptr + first_n
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_tokens, BLOCK_K):
        inside_k = offs_k < n_tokens - start
        left = tl.load(left_ptr + left_offs, mask=inside_m & inside_k[None, :], other=0.0)
        right = tl.load(right_ptr + right_offs, mask=inside_k[:, None] & inside_n, other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        tile = tl.dot(left, right, tile)
        # cast: a stride of 1 is a constant, which has no .to
        left_ptr += BLOCK_K * tl.cast(stride_xt, tl.int64)
        right_ptr += BLOCK_K * tl.cast(stride_xt, tl.int64)

    # half a tile at a time: loading all of acc beside the tile would take more registers than there are
    halves = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left_half, right_half = tl.split(halves)  # [BLOCK_M, BLOCK_N // 2]
    offs_m, offs_n = first_m + offs_m, first_n + tl.arange(0, BLOCK_N // 2)
    add_tile(acc_ptr, stride_am, left_half, offs_m, offs_n, n_cols, n_cols)
    add_tile(acc_ptr, stride_am, right_half, offs_m, offs_n + BLOCK_N // 2, n_cols, n_cols)


@triton.jit
def _mirror_kernel(
    acc_ptr, stride_ae, stride_am,
    offsets_ptr,  # [experts + 1] where SEGMENTS
    n_tokens, n_cols,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) > tl.program_id(1):
        return  # below the diagonal
    if SEGMENTS:
        first, end = segment(offsets_ptr, tl.program_id(2), n_tokens)
        if first >= end:
            return
        acc_ptr += tl.program_id(2) * tl.cast(stride_ae, tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    above = (rows[:, None] < cols[None, :]) & (cols < n_cols)[None, :]
    tile = tl.load(acc_ptr + rows[:, None] * stride_am + cols[None, :], mask=above)  # [BLOCK, BLOCK]
    tl.store(acc_ptr + cols[:, None] * stride_am + rows[None, :], tl.trans(tile), mask=tl.trans(above))


def add_symmetric_(acc: Tensor, x: Tensor) -> None:
    """The Triton matmul; x 16-bit [tokens, features]. Adds to the tiles that reach above the diagonal."""
    n_tokens, n_cols = x.shape
    _hessian_kernel[(triton.cdiv(n_cols, BLOCK_M) * triton.cdiv(n_cols, BLOCK_N),)](
        acc, acc.stride(0), x, x.stride(0), n_tokens, n_cols,
        UPCAST=INTERPRETED, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=8,
        num_warps=8, num_stages=3,
    )  # fmt: skip


def add_addmm_(acc: Tensor, x: Tensor) -> None:
    """torch's matmul; x [tokens, features]."""
    add_product_(acc, x, x)


def mirror_(acc: Tensor) -> None:
    """Copy the upper triangle to the lower one."""
    tiles = triton.cdiv(len(acc), 64)
    _mirror_kernel[(tiles, tiles, 1)](
        acc, 0, acc.stride(0), acc, 0, len(acc), SEGMENTS=False, BLOCK=64, num_warps=4
    )


def _mirror_experts_(acc: Tensor, offsets: Tensor, n_tokens: int) -> None:
    """`mirror_` for each expert that has tokens; acc [experts, in, in]."""
    n_experts, n_cols, _ = acc.shape
    tiles = triton.cdiv(n_cols, 64)
    _mirror_kernel[(tiles, tiles, n_experts)](
        acc, acc.stride(0), acc.stride(1), offsets, n_tokens, n_cols, SEGMENTS=True, BLOCK=64, num_warps=4
    )


def _path(acc: Tensor, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "addmm"
    if not addmm_adds_to_fp32(acc.device.type):
        return "symmetric"
    return path(torch.cuda.get_device_capability(acc.device), len(acc))


def path(capability: tuple[int, int], in_features: int) -> str:
    """Either "symmetric" or "addmm", by the first row of PATHS that fits; "symmetric" if none does."""
    for least_capability, least_features, name in PATHS:
        if capability >= least_capability and in_features >= least_features:
            return name
    return "symmetric"


def add_hessian_(acc: Tensor, x: Tensor, offsets: Tensor | None = None) -> None:
    x = as_rows(x)
    if offsets is not None:
        add_grouped_product_(acc, x, x, offsets, upper=True)
        _mirror_experts_(acc, offsets, len(x))
        return
    add = add_addmm_ if _path(acc, x.dtype) == "addmm" else add_symmetric_
    for tokens in x.split(MOST_TOKENS):
        add(acc, tokens)
    mirror_(acc)
