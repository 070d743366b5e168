"""Stand-in for `wanda_kernels.packed_linear` and `unpack_rows(out=)`, until the kernels are merged."""

import torch
from torch import Tensor

import wanda_kernels
from wanda_kernels import PackedRows

PACKED_LINEAR_ROWS = 8


def unpack_rows(packed: PackedRows, in_features: int, *, out: Tensor | None = None) -> Tensor:
    bits, values, offsets = packed
    if offsets is not None:
        values = values[int(offsets[0]) : int(offsets[-1])]
    weight = wanda_kernels.unpack_rows(PackedRows(bits, values, offsets), in_features)
    return weight if out is None else out.copy_(weight)


def packed_linear(x: Tensor, packed: PackedRows, bias: Tensor | None = None) -> Tensor:
    weight = unpack_rows(packed, x.shape[-1]).float()
    out = (x.float().unsqueeze(-2) * weight).sum(-1)
    return (out if bias is None else out + bias.float()).to(torch.promote_types(x.dtype, x.dtype))
