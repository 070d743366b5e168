"""Two sums over tokens: acc_gate[i, j] += (up[t, i] * act'(gate[t, i]))^2 * x[t, j]^2, and
acc_up[i, j] += act(gate[t, i])^2 * x[t, j]^2; with offsets, those of expert e += the same over its tokens."""

from torch import Tensor

from wanda_kernels.reference.activations import ACTIVATIONS, GATE_EFFECTS
from wanda_kernels.reference.add_sq_norm import add_sq_norm_
from wanda_kernels.reference.segments import segments


def add_gated_coactivation_(
    acc_gate: Tensor,
    acc_up: Tensor,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    activation: str | None,
    sq_norm: Tensor | None,
    offsets: Tensor | None = None,
) -> None:
    if sq_norm is not None:
        add_sq_norm_(sq_norm, x, offsets)
    if offsets is not None:
        tokens = (segments(each, offsets) for each in (gate, up, x))
        for sums in zip(acc_gate, acc_up, *tokens, strict=True):
            add_gated_coactivation_(*sums, activation, None)
        return
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    gate, up = (each.reshape(-1, each.shape[-1]).float() for each in (gate, up))  # [tokens, out]
    acc_gate.addmm_(GATE_EFFECTS[activation](up, gate).square().t(), x.square())
    acc_up.addmm_(ACTIVATIONS[activation](gate).square().t(), x.square())
