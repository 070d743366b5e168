"""The statistics of connect and gated: co-activations of a gated MLP's projections with their input."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import wanda_kernels
from wanda_fast.model.activation_names import kernel_activation
from wanda_fast.model.architecture import Linear
from wanda_fast.pruning.statistics import OutputStatistic, SquaredNorm


class Coactivation(OutputStatistic):
    """connect's: acc[i, j] = sum_t abs(act(gate[t, i])) * abs(x[t, j]), fp32 `[out, in]` of an up projection.

    In a fused projection the gate's rows come first. They get wanda's statistic, sum_t x[t, j]^2.
    """

    operation = "add_coactivation_"

    def __init__(self, linear: Linear, activated: bool = True):
        weight, self.mlp = linear.module.weight, linear.gated
        self.reads, self.norm_of = (self.mlp.gate,), self.mlp.gate
        self._products = torch.zeros(
            self.mlp.width, weight.shape[1], dtype=torch.float32, device=weight.device
        )
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

    def add_outputs(
        self, x: Tensor, outputs: list[Tensor], others: list[OutputStatistic], sq_norm: SquaredNorm | None
    ) -> None:
        gate, sq_norm = outputs[0], self._norm or sq_norm
        if self.mlp.fused:
            gate, _ = self.mlp.halves(outputs)
        if self.activation is not None:
            gate = self.activation(gate)
        acc = None if sq_norm is None else sq_norm.acc
        wanda_kernels.add_coactivation_(self._products, gate, x, self.kernel_activation, sq_norm=acc)


class GatedCoactivation(OutputStatistic):
    """gated's, fp32 `[out, in]` of one projection of h = act(gate) * up, or of both if one linear holds them.

    of up:   acc[i, j] = sum_t act(gate[t, i])^2 * x[t, j]^2
    of gate: acc[i, j] = sum_t (up[t, i] * act'(gate[t, i]))^2 * x[t, j]^2
    """

    operation = "add_gated_coactivation_"

    def __init__(self, linear: Linear):
        self.module, self.mlp = linear.module, linear.gated
        self.reads = (self.mlp.gate,) if self.mlp.fused else (self.mlp.gate, self.mlp.up)
        weight = self.module.weight
        self.acc = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        self.kernel_activation = kernel_activation(self.mlp.activation)

    def add_outputs(
        self, x: Tensor, outputs: list[Tensor], others: list[OutputStatistic], sq_norm: SquaredNorm | None
    ) -> None:
        gate, up = self.mlp.halves(outputs)
        if self.kernel_activation is None:
            gate, up = _effects(self.mlp.activation, gate, up)
        accs: dict[str, Tensor] = {}
        for statistic in (self, *others):
            accs |= statistic._halves()
        # The operation adds to both. A projection that is not pruned gets a sum that is thrown away.
        for missing in {"gate", "up"} - set(accs):
            accs[missing] = torch.zeros_like(self.acc)
        wanda_kernels.add_gated_coactivation_(accs["gate"], accs["up"], gate, up, x, self.kernel_activation)

    def kept(self, module: nn.Module, output: Tensor) -> Tensor:
        in_place = getattr(self.mlp.activation, "inplace", False)
        return output.clone() if in_place and module is not self.reads[-1] else output

    def _halves(self) -> dict[str, Tensor]:
        if self.mlp.fused:
            return dict(zip(("gate", "up"), self.acc.chunk(2), strict=True))
        return {"gate" if self.module is self.mlp.gate else "up": self.acc}


def _effects(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(act(gate), up * act'(gate)), by autograd, of an elementwise activation unknown to the kernels."""
    # Tensors of the inference mode have no gradients; their clones have, outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        gate, up = gate.detach().clone().requires_grad_(), up.detach().clone()
        activated = activation(gate)
        (effect,) = torch.autograd.grad(activated, gate, up)
    return activated.detach(), effect
