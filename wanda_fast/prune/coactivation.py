"""The co-activation of a gated MLP's projections and input: what the scores of connect and gated take the
root of."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import wanda_kernels
from wanda_fast.model.architecture import Linear
from wanda_fast.prune.sq_norm import SquaredNorm

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
    """connect's: acc[i, j] = sum_t abs(act(gate[t, i])) * abs(x[t, j]), fp32 `[out, in]` of an up projection.

    Of a fused projection, the gate's rows come first and are wanda's: sum_t x[t, j]^2 in each.
    """

    operation = "add_coactivation_"

    def __init__(self, linear: Linear, activated: bool = True):
        weight, self.mlp = linear.module.weight, linear.gated
        self.reads = (self.mlp.gate,)
        self._products = torch.zeros(self.mlp.width, weight.shape[1], device=weight.device)
        self._norm = SquaredNorm(linear) if self.mlp.fused else None
        self.kernel_activation, self.activation = None, None
        if activated:
            self.kernel_activation = kernel_activation(self.mlp.activation)
            self.activation = None if self.kernel_activation else self.mlp.activation

    @property
    def acc(self) -> Tensor:
        if self._norm is None:
            return self._products
        return torch.cat([self._norm.acc.expand_as(self._products), self._products])

    def add(
        self, outputs: Sequence[Tensor], x: Tensor, _others: Sequence, sq_norm: SquaredNorm | None
    ) -> None:
        """Add one batch; `sq_norm`, where given, receives the same x in the same read."""
        gate, sq_norm = outputs[0], self._norm or sq_norm
        if self.activation is not None:
            gate = self.activation(gate)
        acc = None if sq_norm is None else sq_norm.acc
        wanda_kernels.add_coactivation_(self._products, gate, x, self.kernel_activation, sq_norm=acc)


class GatedCoactivation:
    """gated's, fp32 `[out, in]` of one projection of h = act(gate) * up, or of both, fused in one linear.

    of up:   acc[i, j] = sum_t act(gate[t, i])^2 * x[t, j]^2
    of gate: acc[i, j] = sum_t (up[t, i] * act'(gate[t, i]))^2 * x[t, j]^2
    """

    operation = "add_gated_coactivation_"

    def __init__(self, linear: Linear):
        self.module, self.mlp = linear.module, linear.gated
        self.reads = (self.mlp.gate,) if self.mlp.fused else (self.mlp.gate, self.mlp.up)
        self.acc = torch.zeros(self.module.weight.shape, device=self.module.weight.device)
        self.kernel_activation = kernel_activation(self.mlp.activation)

    def add(
        self,
        outputs: Sequence[Tensor],
        x: Tensor,
        others: Sequence["GatedCoactivation"],
        _sq_norm: SquaredNorm | None,
    ) -> None:
        """Add one batch, here and to the same MLP's `others`. outputs: of gate and up, not activated."""
        gate, up = outputs
        if self.kernel_activation is None:
            gate, up = _effects(self.mlp.activation, gate, up)
        accs: dict[str, Tensor] = {}
        for statistic in (self, *others):
            accs |= statistic._halves()
        for missing in {"gate", "up"} - set(accs):  # a projection that is not pruned
            accs[missing] = torch.zeros_like(self.acc)
        wanda_kernels.add_gated_coactivation_(accs["gate"], accs["up"], gate, up, x, self.kernel_activation)

    def _halves(self) -> dict[str, Tensor]:
        if self.mlp.fused:
            return dict(zip(("gate", "up"), self.acc.chunk(2), strict=True))
        return {"gate" if self.module is self.mlp.gate else "up": self.acc}


def _effects(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(act(gate), up * act'(gate)) of an elementwise activation that the kernels do not know, by autograd."""
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        activated = activation(gate)
    (effect,) = torch.autograd.grad(activated, gate, up)
    return activated.detach(), effect


def kernel_activation(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The kernels' name of an activation; None where they do not know it."""
    stateless = not isinstance(activation, nn.Module) or not any(True for _ in activation.parameters())
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return "gelu_tanh"
    is_module = isinstance(activation, nn.Module)
    name = type(activation).__name__ if is_module else getattr(activation, "__name__", "")
    return KERNEL_ACTIVATIONS.get(name) if stateless else None
