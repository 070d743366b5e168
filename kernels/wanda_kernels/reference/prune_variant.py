"""Wanda's variant: in each row, prune a score where it and all lower ones sum to at most alpha * the row's
sum.

alpha is bisected until the matrix reaches the ratio. A score counts as a fixed-point number, so that its sums
are exact in any order and every backend finds the same alpha and mask.
Source: Sun et al. 2023, arXiv 2306.11695, appendix, and its published code.
"""

import torch
from torch import Tensor

from wanda_kernels.reference.scores import score, zero_


def prune_variant_(weight: Tensor, scale: Tensor | None, ratio: float, mask: Tensor | None) -> Tensor:
    scores = score(weight, scale)
    ascending, order = scores.sort(dim=1)
    mass = _fixed_point_mass(ascending)  # int64 [out, in]
    total = mass.sum(dim=1, keepdim=True)
    # the sum of all lower scores; equal scores share that of the first of them
    below = mass.cumsum(dim=1) - mass
    first_of_ties = torch.searchsorted(ascending, ascending)
    reach = below.gather(1, first_of_ties) + mass
    reach = torch.empty_like(reach).scatter_(1, order, reach)

    def pruned_at(alpha: float) -> Tensor:
        return reach <= (total.double() * alpha).floor().long()

    low, alpha, high = 0.0, 0.4, 0.8
    pruned = pruned_at(alpha)
    sparsity = int(pruned.sum()) / pruned.numel()
    while abs(sparsity - ratio) > 0.001 and high - low >= 0.001:
        if sparsity > ratio:
            low, alpha, high = low, (alpha + low) / 2, alpha
        else:
            low, alpha, high = alpha, (alpha + high) / 2, high
        pruned = pruned_at(alpha)
        sparsity = int(pruned.sum()) / pruned.numel()
    zero_(weight, pruned, mask)
    return torch.tensor(alpha, dtype=torch.float64, device=weight.device)


def fraction_bits(in_features: int) -> int:
    """Bits of a score's fixed-point mass below the row's exponent; a row's sum stays exact in fp64."""
    return min(36, 53 - max(in_features - 1, 1).bit_length())


def _fixed_point_mass(scores: Tensor) -> Tensor:
    """floor(score * 2^(bits - E)), int64, where 2^(E-1) <= the row's largest score < 2^E and E >= -125.

    An infinite score (a product that overflowed) counts as the largest finite fp32.
    """
    scores = scores.clamp(max=torch.finfo(torch.float32).max)
    _, exponent = torch.frexp(scores.amax(dim=1, keepdim=True))
    shift = fraction_bits(scores.shape[1]) - exponent.clamp(min=-125).long()
    # built from its bits: exp2 need not be exact
    power_of_two = (shift + 1023 << 52).view(torch.float64)
    return (scores.double() * power_of_two).long()
