"""The statistics of connect and gated: co-activations of a gated MLP's projections with their input."""

import torch
from torch import Tensor, nn

import wanda_kernels
from wanda_fast.model.activation_names import kernel_activation
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.statistics import OutputStatistic, SquaredNorm


class Coactivation(OutputStatistic):
    """connect's: acc[i, j] = sum_t abs(act(gate[t, i])) * abs(x[t, j]), fp32 `[out, in]` of an up projection.

    In a fused projection the gate's rows come first. They get wanda's statistic, sum_t x[t, j]^2.
    """

    operation = "add_coactivation_"
    sums = "_products"
    degree = 1

    def __init__(self, linear: Linear, activated: bool = True):
        weight, self.mlp, self.part = linear.weight, linear.gated, linear.part
        self.reads, self.norm_of = (self.mlp.gate,), self.mlp.gate
        both = linear.part == "both"
        rows = len(weight) // 2 if both else len(weight)
        self._products = torch.zeros(rows, weight.shape[1], dtype=torch.float32, device=weight.device)
        self._norm = SquaredNorm(linear) if both else None
        self.activated = activated
        self.kernel_activation = kernel_activation(self.mlp.activation) if activated else None

    @property
    def acc(self) -> Tensor:
        if self._norm is None:
            return self._products
        return torch.cat([self._norm.acc.expand_as(self._products), self._products])

    def partial_sums(self) -> list[Tensor]:
        return [self._products] if self._norm is None else [self._products, self._norm.acc]

    def add_outputs(
        self, x: Tensor, outputs: list[Tensor], others: list[OutputStatistic], sq_norm: SquaredNorm | None
    ) -> None:
        sq_norm = self._norm or sq_norm
        acc = None if sq_norm is None else sq_norm.acc
        gate = self._gate(outputs)
        wanda_kernels.add_coactivation_(self._products, gate, x, self.kernel_activation, sq_norm=acc)

    def add_expert_outputs(self, sums: dict[str, Tensor], x: Tensor, output: Tensor, offsets: Tensor) -> None:
        gate = self._gate([output])
        wanda_kernels.add_coactivation_(sums["up"], gate, x, self.kernel_activation, offsets=offsets)

    def _gate(self, outputs: list[Tensor]) -> Tensor:
        """The gate's output; behind its activation, if the kernels do not have that."""
        gate, up = self.mlp.halves(outputs) if self.mlp.fused else (outputs[0], None)
        if not self.activated or self.kernel_activation is not None:
            return gate
        if self.mlp.activation is not None:
            return self.mlp.activation(gate)
        # The product is another one than act(gate) * up: its derivative by up stands for act(gate).
        by_up, _ = self.mlp.effects(gate, up)
        return by_up


class GatedCoactivation(OutputStatistic):
    """gated's, fp32 `[out, in]` of one projection of h = act(gate) * up, or of both if one linear holds them.

    of up:   acc[i, j] = sum_t act(gate[t, i])^2 * x[t, j]^2
    of gate: acc[i, j] = sum_t (up[t, i] * act'(gate[t, i]))^2 * x[t, j]^2
    """

    operation = "add_gated_coactivation_"
    sums = "acc"

    def __init__(self, linear: Linear):
        self.part, self.mlp = linear.part, linear.gated
        self.reads = (self.mlp.gate,) if self.mlp.fused else (self.mlp.gate, self.mlp.up)
        weight = linear.weight
        self.acc = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        self.kernel_activation = kernel_activation(self.mlp.activation)

    def add_outputs(
        self, x: Tensor, outputs: list[Tensor], others: list[OutputStatistic], sq_norm: SquaredNorm | None
    ) -> None:
        accs: dict[str, Tensor] = {}
        for statistic in (self, *others):
            accs |= statistic._halves()
        self._add(accs, x, outputs)

    def add_expert_outputs(self, sums: dict[str, Tensor], x: Tensor, output: Tensor, offsets: Tensor) -> None:
        self._add(dict(sums), x, [output], offsets=offsets)

    def _add(self, accs: dict[str, Tensor], x: Tensor, outputs: list[Tensor], **segments: Tensor) -> None:
        gate, up = self.mlp.halves(outputs)
        if self.kernel_activation is None:
            gate, up = self.mlp.effects(gate, up)
        # The operation adds to both. A projection that is not pruned gets a sum that is thrown away.
        for missing in {"gate", "up"} - set(accs):
            accs[missing] = torch.zeros_like(next(iter(accs.values())))
        accs = accs["gate"], accs["up"]
        wanda_kernels.add_gated_coactivation_(*accs, gate, up, x, self.kernel_activation, **segments)

    def kept(self, module: nn.Module, output: Tensor) -> Tensor:
        in_place = getattr(self.mlp.activation, "inplace", False)
        return output.clone() if in_place and module is not self.reads[-1] else output

    def _halves(self) -> dict[str, Tensor]:
        if self.part == "both":
            return dict(zip(("gate", "up"), self.acc.chunk(2), strict=True))
        return {self.part: self.acc}
