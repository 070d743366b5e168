"""A product with packed rows in plain torch. `operations/packed.py` documents the arguments.

A pruned weight's product is left out, so that an infinite x times a pruned weight is no NaN. Each row of x
has a sum of its own, whose order does not depend on the other rows. The AVX2 and portable kernels add
column j's product to sum j % 8, in the order of columns, with one rounding (a fused multiply-add; the
portable kernel rounds the product too). At the end they add sums 4 apart, then 2 apart, then 1 apart.
"""

import torch
from torch import Tensor

from wanda_kernels.mask_bits import unpack_bits
from wanda_kernels.reference.unpack_rows import unpack_rows


def packed_linear(
    x: Tensor, bits: Tensor, values: Tensor, offsets: Tensor | None, bias: Tensor | None
) -> Tensor:
    n_cols = x.shape[-1]
    kept = unpack_bits(bits, n_cols)
    weight = torch.empty(kept.shape, dtype=values.dtype, device=values.device)
    unpack_rows(weight, bits, values, offsets)
    weight = weight.float()
    rows = [torch.where(kept, weight * row, 0.0).sum(1) for row in x.reshape(-1, n_cols).float()]
    sums = torch.stack(rows)
    if bias is not None:
        sums += bias.float()
    return sums.to(x.dtype).view(*x.shape[:-1], len(bits))
