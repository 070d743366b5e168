"""Products over tokens by torch's matmul, summed in fp32 whatever the operands are."""

from functools import cache

import torch
from torch import Tensor

# Tensor cores cut their running sums off, about 2^-24 for every 16 tokens: at most 6e-5 of the sum of the
# terms' magnitudes in so many tokens. What is added to acc is then rounded to nearest.
MOST_TOKENS = 16_384


@cache
def addmm_adds_to_fp32(device: str) -> bool:
    """Whether torch.addmm adds 16-bit operands' product to fp32 there (torch 2.10 and later, on CUDA)."""
    acc, x = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(acc, x, x, out_dtype=torch.float32, out=acc)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def add_product_(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc fp32 [m, n] += a^T b; a [tokens, m] and b [tokens, n] of one dtype, 16-bit only where
    `addmm_adds_to_fp32`."""
    if b.dtype == torch.float32:
        acc.addmm_(a.t(), b)
    else:
        torch.addmm(acc, a.t(), b, out_dtype=torch.float32, out=acc)
