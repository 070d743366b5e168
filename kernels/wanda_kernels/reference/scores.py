"""The score that every selection compares, and how its result is written.

A score is `abs(float(W)) * sqrt(scale)` in fp32, one rounding each. NaN sorts last, as in torch. Pruned
weights become +0.0; kept weights keep their bits, a kept -0.0 too.
"""

from torch import Tensor

from wanda_kernels.mask_bits import pack_bits


def score(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Importance of each weight, fp32 of its shape: abs(W) * sqrt(scale), or abs(W) where scale is None."""
    magnitude = weight.float().abs()
    if scale is None:
        return magnitude
    if scale.dim() < weight.dim():
        scale = scale.unsqueeze(-2)  # one row of scales for all rows of a matrix
    return magnitude * scale.sqrt()


def zero_(weight: Tensor, pruned: Tensor, mask: Tensor | None) -> None:
    """Zero weights where `pruned`, bool of their shape, is True, and write the packed mask of the others."""
    weight.masked_fill_(pruned, 0.0)
    if mask is not None:
        mask.copy_(pack_bits(~pruned))
