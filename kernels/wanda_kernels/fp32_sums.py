"""Products over tokens by torch's matmul, summed in fp32 for operands of any dtype."""

from functools import cache

import torch
from torch import Tensor

# Tensor cores truncate their running sums, by about 2^-24 for every 16 tokens. Over this many tokens the
# error is at most 6e-5 of the sum of the terms' magnitudes. Adding the result to acc rounds to nearest.
MOST_TOKENS = 16_384


@cache
def addmm_adds_to_fp32(device: str) -> bool:
    """Whether torch.addmm can add a product of 16-bit operands to fp32 on a device (CUDA, torch >= 2.10)."""
    acc, x = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(acc, x, x, out_dtype=torch.float32, out=acc)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def add_product_(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc += a^T b, where acc is fp32 [m, n], and a [tokens, m] and b [tokens, n] have the same dtype.

    16-bit operands need `addmm_adds_to_fp32`.
    """
    if b.dtype == torch.float32:
        acc.addmm_(a.t(), b)
    else:
        torch.addmm(acc, a.t(), b, out_dtype=torch.float32, out=acc)
