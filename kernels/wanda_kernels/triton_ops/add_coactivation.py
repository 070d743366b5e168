"""Co-activation of a gated MLP: acc[i, j] += sum_t abs(act(gate[t, i]))^power * abs(x[t, j])^power.

gate [tokens, out], x [tokens, in], acc fp32 [out, in]. 2 * tokens * out * in FLOP on tensor cores: the roof
is the matmul rate from about 2,000 tokens a call; acc is read and written once a call, 8 bytes an element.
Two paths. "addmm": an elementwise pass writes both operands in 16 bits and sums x^2, so that x is read once;
then cuBLAS adds their product to acc. "fused": one Triton matmul that applies both functions as it loads.
With offsets, a grouped Triton matmul takes cuBLAS's place, and another kernel sums x^2.
Operands are rounded to the input's dtype, squares to bf16, because fp16 overflows at 256^2. All terms are
positive, so a sum's relative error stays below an operand pair's: 2^-7 in bf16, 2^-10 in fp16.
Source: Wanda-CoNNect; the squares are this project's `gated` method.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.fp32_sums import add_product_, addmm_adds_to_fp32
from wanda_kernels.native.ops import as_rows
from wanda_kernels.triton_ops.add_sq_norm import add_sq_norm_, add_total_, slabs
from wanda_kernels.triton_ops.grouped_product import INTERPRETED, add_grouped_product_, add_tile

# compute capability at least, out * in features at least, path; the first row that fits. Measured for sm_90,
# estimated for sm_80: see benchmarks/LOG.md
PATHS = (
    # wgmma waits for operands that pass through registers: elementwise first, then cuBLAS
    ((9, 0), 0, "addmm"),
    # mma.sync takes operands from registers, so abs and silu are free
    ((8, 0), 108 * 128 * 256, "fused"),
    # fewer tiles than an A100 has multiprocessors: cuBLAS splits the tokens
    ((8, 0), 0, "addmm"),
)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        y = x
    return y


@triton.jit
def _operand(x, ACTIVATION: tl.constexpr, POWER: tl.constexpr):
    """abs(act(x))^POWER in fp32."""
    y = tl.abs(activate(x.to(tl.float32), ACTIVATION))
    if POWER == 2:
        y = y * y
    return y


@triton.jit
def _operand_kernel(
    x_ptr, stride_xm,
    y_ptr, stride_ym,
    partial_ptr,  # fp32 [slabs, n_cols], sums of x^2 where SUMS
    n_tokens, n_cols, slab_tokens,
    ACTIVATION: tl.constexpr, POWER: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = slab * slab_tokens, tl.minimum((slab + 1) * slab_tokens, n_tokens)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        inside = (tokens < end)[:, None] & (cols < n_cols)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * stride_xm + cols[None, :], mask=inside, other=0.0)
        y = _operand(x, ACTIVATION, POWER).to(y_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
        tl.store(y_ptr + tokens[:, None] * stride_ym + cols[None, :], y, mask=inside)
        if SUMS:
            x = x.to(tl.float32)
            sums += x * x
    if SUMS:
        tl.store(partial_ptr + slab * n_cols + cols, tl.sum(sums, axis=0), mask=cols < n_cols)


@triton.jit
def _coactivation_kernel(
    acc_ptr, stride_am,
    gate_ptr, stride_gt,
    x_ptr, stride_xt,
    n_tokens, n_out, n_in,
    ACTIVATION: tl.constexpr, POWER: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share GROUP_M bands of gate columns, so these come from L2
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(n_out, BLOCK_M), tl.cdiv(n_in, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    first_m = (group * GROUP_M + within % rows_in_group).to(tl.int64) * BLOCK_M
    first_n = (within // rows_in_group).to(tl.int64) * BLOCK_N

    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    gate_offs = offs_m[:, None] + offs_k[None, :] * stride_gt  # [BLOCK_M, BLOCK_K]
    x_offs = offs_k[:, None] * stride_xt + offs_n[None, :]  # [BLOCK_K, BLOCK_N]
    inside_m, inside_n = (first_m + offs_m < n_out)[:, None], (first_n + offs_n < n_in)[None, :]
    gate_ptr += first_m
    x_ptr += first_n
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_tokens, BLOCK_K):
        inside_k = offs_k < n_tokens - start
        gate = tl.load(gate_ptr + gate_offs, mask=inside_m & inside_k[None, :], other=0.0)
        x = tl.load(x_ptr + x_offs, mask=inside_k[:, None] & inside_n, other=0.0)
        gate = _operand(gate, ACTIVATION, POWER).to(OPERAND)  # act(0) = 0: padding adds nothing
        x = _operand(x, None, POWER).to(OPERAND)
        tile = tl.dot(gate, x, tile)
        # cast: a stride of 1 is a constant, which has no .to
        gate_ptr += BLOCK_K * tl.cast(stride_gt, tl.int64)
        x_ptr += BLOCK_K * tl.cast(stride_xt, tl.int64)

    # half a tile at a time: loading all of acc beside the tile would spill 256 bytes a thread
    halves = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)  # [BLOCK_M, BLOCK_N // 2]
    offs_m, offs_n = first_m + offs_m, first_n + tl.arange(0, BLOCK_N // 2)
    add_tile(acc_ptr, stride_am, left, offs_m, offs_n, n_out, n_in)
    add_tile(acc_ptr, stride_am, right, offs_m, offs_n + BLOCK_N // 2, n_out, n_in)


def _block_sizes(n_out: int, n_in: int, activation: str | None) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    if n_out * n_in < 108 * 128 * 256:
        return 64, 64, 32, 4, 4  # small layers: more tiles than multiprocessors
    if activation == "gelu":
        return 128, 128, 32, 8, 4  # erf needs registers: the next tile would spill 104 bytes
    return 128, 256, 32, 8, 3  # 128 fp32 sums a thread; the most FLOP a byte of shared memory


def add_fused_(acc: Tensor, gate: Tensor, x: Tensor, activation: str | None, power: int) -> None:
    """One Triton matmul; gate and x 16-bit [tokens, features]."""
    n_tokens, n_out = gate.shape
    n_in = x.shape[1]
    operand = tl.float32 if INTERPRETED else _triton_dtype(_operand_dtype(x.dtype, power))
    block_m, block_n, block_k, num_warps, num_stages = _block_sizes(n_out, n_in, activation)
    _coactivation_kernel[(triton.cdiv(n_out, block_m) * triton.cdiv(n_in, block_n),)](
        acc, acc.stride(0), gate, gate.stride(0), x, x.stride(0), n_tokens, n_out, n_in,
        ACTIVATION=activation, POWER=power, OPERAND=operand,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=8,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def add_addmm_(
    acc: Tensor, gate: Tensor, x: Tensor, activation: str | None, power: int, sq_norm: Tensor | None
) -> None:
    """Elementwise passes, then torch's matmul; gate and x [tokens, features]."""
    gate = operand(gate, activation, power, None)
    x = operand(x, None, power, sq_norm)
    add_product_(acc, gate, x)


def operand(x: Tensor, activation: str | None, power: int, sq_norm: Tensor | None) -> Tensor:
    """abs(act(x))^power as a matmul's operand; the column sums of x^2 are added to sq_norm if given."""
    n_tokens, n_cols = x.shape
    n_slabs, slab_tokens = slabs(n_tokens)
    y = torch.empty(n_tokens, n_cols, dtype=_operand_dtype(x.dtype, power), device=x.device)
    partial = y
    if sq_norm is not None:
        partial = torch.empty(n_slabs, n_cols, dtype=torch.float32, device=x.device)
    _operand_kernel[(triton.cdiv(n_cols, 128), n_slabs)](
        x, x.stride(0), y, y.stride(0), partial, n_tokens, n_cols, slab_tokens,
        ACTIVATION=activation, POWER=power, SUMS=sq_norm is not None, BLOCK_M=32, BLOCK_N=128, num_warps=4,
    )  # fmt: skip
    if sq_norm is not None:
        add_total_(sq_norm, partial)
    return y


def _operand_dtype(dtype: torch.dtype, power: int) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float16 and power == 2 else dtype


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def path(capability: tuple[int, int], out_features: int, in_features: int) -> str:
    """Either "fused" or "addmm", by the first row of PATHS that fits; "fused" if none does."""
    for least_capability, least_elements, name in PATHS:
        if capability >= least_capability and out_features * in_features >= least_elements:
            return name
    return "fused"


def _path(acc: Tensor, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "addmm"
    if not addmm_adds_to_fp32(acc.device.type):
        return "fused"
    return path(torch.cuda.get_device_capability(acc.device), *acc.shape)


def add_coactivation_(
    acc: Tensor,
    gate: Tensor,
    x: Tensor,
    activation: str | None,
    power: int,
    sq_norm: Tensor | None,
    offsets: Tensor | None = None,
) -> None:
    gate, x = as_rows(gate), as_rows(x)
    if offsets is None and _path(acc, x.dtype) == "addmm":
        add_addmm_(acc, gate, x, activation, power, sq_norm)
        return
    if offsets is None:
        add_fused_(acc, gate, x, activation, power)
    else:
        gate_operand, x_operand = operand(gate, activation, power, None), operand(x, None, power, None)
        add_grouped_product_(acc, gate_operand, x_operand, offsets)
    if sq_norm is not None:
        add_sq_norm_(sq_norm, x, offsets)
