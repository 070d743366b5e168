"""acc[i, j] += sum over tokens of abs(act(gate[t, i]))^power * abs(x[t, j])^power; with offsets, acc[e] +=
the same over expert e's tokens."""

from torch import Tensor

from wanda_kernels.reference.activations import ACTIVATIONS
from wanda_kernels.reference.add_sq_norm import add_sq_norm_
from wanda_kernels.reference.segments import segments


def add_coactivation_(
    acc: Tensor,
    gate: Tensor,
    x: Tensor,
    activation: str | None,
    power: int,
    sq_norm: Tensor | None,
    offsets: Tensor | None = None,
) -> None:
    if sq_norm is not None:
        add_sq_norm_(sq_norm, x, offsets)
    if offsets is not None:
        for sums, *tokens in zip(acc, segments(gate, offsets), segments(x, offsets), strict=True):
            add_coactivation_(sums, *tokens, activation, power, None)
        return
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    gate = ACTIVATIONS[activation](gate.reshape(-1, gate.shape[-1]).float())  # [tokens, out]
    acc.addmm_(gate.abs().pow(power).t(), x.abs().pow(power))
