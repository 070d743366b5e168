"""What is right: every operation in plain torch, vectorised, on any device; others equal it bit for bit.

A score is `abs(float(W)) * sqrt(scale)` in fp32, one rounding each. Equal scores lose the lower column first.
NaN sorts last, as in torch. Pruned weights become +0.0; kept weights keep their bits, a kept -0.0 too.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    None: lambda gate: gate,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
}
# (up, gate) -> up * act'(gate)
GATE_EFFECTS = {
    None: lambda up, gate: up,
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward, threshold=0),
}


def score(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Importance of each weight, fp32 `[out, in]`: abs(W) * sqrt(scale), or abs(W) where scale is None."""
    magnitude = weight.float().abs()
    return magnitude if scale is None else magnitude * scale.sqrt()


def add_sq_norm_(acc: Tensor, x: Tensor) -> None:
    x = x.reshape(-1, x.shape[-1]).float()
    acc += x.square().sum(dim=0)


def add_coactivation_(
    acc: Tensor, gate: Tensor, x: Tensor, activation: str | None, power: int, sq_norm: Tensor | None
) -> None:
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    gate = ACTIVATIONS[activation](gate.reshape(-1, gate.shape[-1]).float())  # [tokens, out]
    acc.addmm_(gate.abs().pow(power).t(), x.abs().pow(power))
    if sq_norm is not None:
        add_sq_norm_(sq_norm, x)


def add_hessian_(acc: Tensor, x: Tensor) -> None:
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    product = x.t() @ x
    acc += (product + product.t()) / 2  # a matmul's rounding need not be symmetric


def add_gated_coactivation_(
    acc_gate: Tensor,
    acc_up: Tensor,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    activation: str | None,
    sq_norm: Tensor | None,
) -> None:
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    gate, up = (each.reshape(-1, each.shape[-1]).float() for each in (gate, up))  # [tokens, out]
    acc_gate.addmm_(GATE_EFFECTS[activation](up, gate).square().t(), x.square())
    acc_up.addmm_(ACTIVATIONS[activation](gate).square().t(), x.square())
    if sq_norm is not None:
        add_sq_norm_(sq_norm, x)


def prune_rows_(weight: Tensor, scale: Tensor | None, num_pruned: int, mask: Tensor | None) -> None:
    lowest = score(weight, scale).sort(dim=1, stable=True).indices[:, :num_pruned]
    pruned = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, lowest, True)
    _apply_(weight, pruned, mask)


def prune_nm_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    groups = score(weight, scale).reshape(-1, m)  # [out * in / m, m]
    lowest = groups.sort(dim=1, stable=True).indices[:, : m - n]
    pruned = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True)
    _apply_(weight, pruned.view(weight.shape), mask)


def prune_matrix_(weight: Tensor, scale: Tensor | None, rank: int, mask: Tensor | None) -> None:
    scores = score(weight, scale)
    threshold = scores.flatten().sort().values[rank]
    _apply_(weight, scores <= threshold, mask)


def prune_variant_(weight: Tensor, scale: Tensor | None, ratio: float, mask: Tensor | None) -> Tensor:
    scores = score(weight, scale)
    ascending, order = scores.sort(dim=1)
    mass = _fixed_point_mass(ascending)  # int64: its sums are exact in any order
    total = mass.sum(dim=1, keepdim=True)
    below = mass.cumsum(dim=1) - mass  # what stands before this one; for ties, before the first of them
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
    _apply_(weight, pruned, mask)
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
    power_of_two = (shift + 1023 << 52).view(torch.float64)  # exact, which exp2 need not be
    return (scores.double() * power_of_two).long()


def _apply_(weight: Tensor, pruned: Tensor, mask: Tensor | None) -> None:
    weight.masked_fill_(pruned, 0.0)
    if mask is not None:
        mask.copy_(pack_bits(~pruned))


def pack_bits(kept: Tensor) -> Tensor:
    """bool `[out, in]` -> uint8 `[out, ceil(in / 8)]`, as numpy's packbits(bitorder='little')."""
    n_rows, n_cols = kept.shape
    padded = F.pad(kept.to(torch.uint8), (0, -n_cols % 8)).view(n_rows, math.ceil(n_cols / 8), 8)
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=kept.device)
    return (padded * place).sum(dim=2, dtype=torch.uint8)


def unpack_bits(mask: Tensor, in_features: int) -> Tensor:
    """uint8 `[out, ceil(in / 8)]` -> bool `[out, in]`, the inverse of `pack_bits`."""
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(2) & place).ne(0).flatten(1)[:, :in_features]
