"""Packed masks: one bit for each weight, as numpy's packbits(bitorder="little") packs each row."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(kept: Tensor) -> Tensor:
    """Pack a mask of kept weights: bit j % 8 of byte j // 8 of a row is 1 where column j is kept.

    Args:
        kept: bool `[out, in]`, or `[experts, out, in]`, of any strides, True where the weight is kept.

    Returns: uint8 `[out, ceil(in / 8)]`, or `[experts, out, ceil(in / 8)]`, contiguous, on the same device;
        padding bits are 0.
    """
    n_cols = kept.shape[-1]
    padded = F.pad(kept.contiguous().to(torch.uint8), (0, -n_cols % 8))
    padded = padded.view(*kept.shape[:-1], math.ceil(n_cols / 8), 8)
    return (padded * _powers_of_two(kept.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, in_features: int) -> Tensor:
    """Unpack a packed mask, the inverse of `pack_bits`.

    Args:
        mask: uint8 `[out, ceil(in / 8)]`, or `[experts, out, ceil(in / 8)]`, as an operation's `mask`
            argument receives it.
        in_features: columns of the weight; the padding bits after them are dropped.

    Returns: bool `[out, in]`, or `[experts, out, in]`, True where the weight is kept, on the same device.
    """
    return (mask.unsqueeze(-1) & _powers_of_two(mask.device)).ne(0).flatten(-2)[..., :in_features]


def _powers_of_two(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
