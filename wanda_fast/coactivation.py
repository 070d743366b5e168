"""The co-activation of a gated MLP's gate and input: what connect's score takes the root of."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import wanda_kernels
from wanda_fast.architecture import Linear
from wanda_fast.sq_norm import SquaredNorm

KERNEL_ACTIVATIONS = {  # an activation's class or function name -> the name that the kernels know
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "gelu": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "relu": "relu",
}


class Coactivation:
    """acc[i, j] = sum_t abs(act(gate[t, i])) * abs(x[t, j]), fp32 `[out, in]` of an up projection."""

    operation = "add_coactivation_"

    def __init__(self, linear: Linear, activated: bool = True):
        weight = linear.module.weight
        self.acc = torch.zeros(weight.shape, device=weight.device)
        self.gate = linear.gated.gate
        self.kernel_activation, self.activation = None, None
        if activated:
            self.kernel_activation = _kernel_activation(linear.gated.activation)
            self.activation = None if self.kernel_activation else linear.gated.activation

    def add(self, gate: Tensor, x: Tensor, sq_norm: SquaredNorm | None) -> None:
        """Add one batch; `sq_norm`, where given, receives the same x in the same read."""
        if self.activation is not None:
            gate = self.activation(gate)
        acc = None if sq_norm is None else sq_norm.acc
        wanda_kernels.add_coactivation_(self.acc, gate, x, self.kernel_activation, sq_norm=acc)


def _kernel_activation(activation: Callable[[Tensor], Tensor]) -> str | None:
    stateless = not isinstance(activation, nn.Module) or not any(True for _ in activation.parameters())
    name = type(activation).__name__ if isinstance(activation, nn.Module) else activation.__name__
    return KERNEL_ACTIVATIONS.get(name) if stateless else None
