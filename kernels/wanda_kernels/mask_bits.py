"""Packed masks: one bit for each weight, as numpy's packbits(bitorder="little") packs each row; packed rows:
such bits, and the kept weights alone."""

import math
from typing import NamedTuple

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


class PackedRows(NamedTuple):
    """A weight without most of its zeros.

    Attributes:
        bits: uint8 `[out, ceil(in / 8)]`, or `[experts, out, ceil(in / 8)]`: which weights have a value.
        values: `[out, kept]`, or `[experts, out, kept]`, in the order of columns; `[values]` of all rows one
            after another if there are offsets.
        offsets: int64 `[out + 1]`, or `[experts * out + 1]`: where the values of each row begin and end; None
            if all rows have the same number.
    """

    bits: Tensor
    values: Tensor
    offsets: Tensor | None


def pack_rows(weight: Tensor) -> PackedRows:
    """Pack a weight, losslessly: all that is not +0.0 has a value. `unpack_rows` is the inverse.

    Rows with fewer values than the longest get some zeros as values if that takes no more bytes than offsets.

    Args:
        weight: `[out, in]` or `[experts, out, in]`, of any dtype and strides.
    """
    weight = weight.contiguous()
    kept = as_integers(weight).ne(0)
    counts = kept.sum(-1)
    longest = int(counts.max()) if counts.numel() else 0
    total = int(counts.sum())
    offsets = None
    if (longest * counts.numel() - total) * weight.element_size() > 8 * (counts.numel() + 1):
        offsets = F.pad(counts.flatten().cumsum(0), (1, 0))
    elif longest * counts.numel() > total:
        zeros = ~kept
        kept |= zeros & (zeros.cumsum(-1, dtype=torch.int32) <= (longest - counts).unsqueeze(-1))
    values = _selected(as_integers(weight), kept).view(weight.dtype)
    shape = (-1,) if offsets is not None else (*counts.shape, longest)
    return PackedRows(pack_bits(kept), values.view(shape), offsets)


def _selected(integers: Tensor, kept: Tensor) -> Tensor:
    if integers.device.type != "cpu":
        return integers[kept]
    # A third of torch's time, and none of its memory for indices.
    return torch.from_numpy(integers.numpy()[kept.numpy()])


def as_integers(weight: Tensor) -> Tensor:
    """The same memory as integers of the elements' size, which keep every bit."""
    return weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


def _powers_of_two(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
