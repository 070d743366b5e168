"""acc[i, j] += sum over tokens of abs(act(gate[t, i]))^power * abs(x[t, j])^power."""

from torch import Tensor

from wanda_kernels.reference.activations import ACTIVATIONS
from wanda_kernels.reference.add_sq_norm import add_sq_norm_


def add_coactivation_(
    acc: Tensor, gate: Tensor, x: Tensor, activation: str | None, power: int, sq_norm: Tensor | None
) -> None:
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    gate = ACTIVATIONS[activation](gate.reshape(-1, gate.shape[-1]).float())  # [tokens, out]
    acc.addmm_(gate.abs().pow(power).t(), x.abs().pow(power))
    if sq_norm is not None:
        add_sq_norm_(sq_norm, x)
