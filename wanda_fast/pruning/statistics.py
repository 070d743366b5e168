"""Statistics: what a method gathers from the calibration tokens about the input of a linear.

`Method.statistic` names one for each linear. `SquaredNorm` is wanda's; those of connect and gated, which also
read the outputs of a gated MLP's projections, are in `coactivation.py`.
"""

import torch
from torch import Tensor, nn

import wanda_kernels
from wanda_fast.model.linears import GatedMLP, Linear
from wanda_kernels.forward import saved_column_squares


class Statistic:
    """A sum over calibration tokens for one linear. To bring your own, subclass it, define `add`, and return
    it from `Method.statistic`.

    Linears that read the same tensor (q, k, v; gate, up) share one statistic of a class: the first of them
    adds the tensor. So `acc` must follow from the input alone.

    Attributes:
        acc: fp32 `[in]` or `[out, in]`, on the weight's device: what `Method.score` receives.
        operation: the name under which the report lists it.
        reads_column_squares: `add` uses column sums of squares that a forward's kernel may have saved.
        degree: of the power of x that is summed.
        sums: the attribute that holds the sums, if those of all experts may be parts of one tensor, to which
            `add_experts` adds. None: each expert has its own.
    """

    operation = "statistic"
    acc: Tensor
    reads_column_squares = False
    sums: str | None = None
    degree = 2

    def add(self, x: Tensor) -> None:
        """Add one batch of inputs, `[..., in]`, in the dtype of the forward."""
        raise NotImplementedError

    def partial_sums(self) -> list[Tensor]:
        """The tensors that several ranks sum, since each of them has added its own tokens."""
        return [self.acc]

    def add_experts(self, sums: Tensor, x: Tensor, offsets: Tensor) -> None:
        """Add one batch of inputs to the sums of all experts, `[experts, ...]`.

        Args:
            x: `[tokens, in]`; those of expert e are in the rows `offsets[e]:offsets[e + 1]`.
        """
        raise NotImplementedError


class OutputStatistic(Statistic):
    """A statistic that also reads outputs of modules, such as that of a gated MLP's gate.

    Attributes:
        reads: these modules; they receive the same tensor as the linear.
        norm_of: a module whose `SquaredNorm` `add_outputs` can add too, so that x is read once; None: none.
    """

    reads: tuple[nn.Module, ...]
    norm_of: nn.Module | None = None

    def add_outputs(
        self, x: Tensor, outputs: list[Tensor], others: list["OutputStatistic"], sq_norm: "SquaredNorm | None"
    ) -> None:
        """Add one batch.

        Args:
            outputs: of the modules in `reads`, in that order.
            others: statistics of the same class that read the same modules; they are added here as well.
            sq_norm: the statistic of `norm_of`, if it has yet to be added.
        """
        raise NotImplementedError

    def add_expert_outputs(self, sums: dict[str, Tensor], x: Tensor, output: Tensor, offsets: Tensor) -> None:
        """Add one batch of a projection's inputs and outputs to the sums of all experts, as `add_experts`.

        Args:
            sums: `[experts, out, in]` of the projection's parts that have this statistic, by `Linear.part`.
        """
        raise NotImplementedError

    def kept(self, module: nn.Module, output: Tensor) -> Tensor:
        """The output of a module in `reads`, safe from what the forward does before all are known."""
        return output


class SquaredNorm(Statistic):
    """acc[j] = sum over tokens of x[t, j]^2, fp32 `[in]`: what wanda's score takes the root of."""

    operation = "add_sq_norm_"
    reads_column_squares = True
    sums = "acc"

    def __init__(self, linear: Linear):
        weight = linear.weight
        self.acc = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)

    def add(self, x: Tensor) -> None:
        saved = saved_column_squares(x)
        if saved is None:
            wanda_kernels.add_sq_norm_(self.acc, x)
        else:
            self.acc += saved.sum(0)

    def add_experts(self, sums: Tensor, x: Tensor, offsets: Tensor) -> None:
        wanda_kernels.add_sq_norm_(sums, x, offsets=offsets)


class DenseInputs:
    """A down projection's statistic for `--sequential linear`: act(gate(x)) * up(x), gate and up still dense.

    When the down projection is reached, gate and up are pruned, and the norms of what they put out say less:
    at 2:4, wanda's choice by them costs SmolLM2 6% of perplexity (benchmarks/LOG.md). So a share of the
    calibration goes through both dense projections for these norms.
    """

    # One in this many. TOKENS is odd: with an even number, it could be the first token of each sequence.
    SEQUENCES, TOKENS = 8, 9

    def __init__(self, mlp: GatedMLP, norm: Statistic, before: tuple[int, int] = (0, 0)):
        """
        Args:
            before: sequences and tokens that other ranks have before this one's.
        """
        self.mlp, self.norm = mlp, norm
        self.projections = {mlp.gate, mlp.up}
        self._sequences, self._tokens = before

    def add(self, x: Tensor) -> None:
        """x `[sequences, tokens, in]` or `[tokens, in]`, before either projection is pruned."""
        if x.dim() > 2:
            part = x[-self._sequences % self.SEQUENCES :: self.SEQUENCES]
            self._sequences += len(x)
        else:
            part = x[-self._tokens % self.TOKENS :: self.TOKENS]
            self._tokens += len(x)
        if not part.numel():
            return
        outputs = [module.forward(part) for module in dict.fromkeys((self.mlp.gate, self.mlp.up))]
        gate, up = self.mlp.halves(outputs)
        self.norm.add(self.mlp.hidden(gate, up))
