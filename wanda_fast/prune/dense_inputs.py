"""`--sequential linear`: what a gated MLP's down projection receives while the other two are dense.

By then they are pruned, and the norms of what pruned projections put out say less: at 2:4, wanda's choice by
them costs SmolLM2 6% of perplexity (benchmarks/LOG.md). A share of the calibration goes through both dense
projections for these norms; everything else follows the pruned output.
"""

from collections.abc import Callable

from torch import Tensor

from wanda_fast.model.architecture import Block, GatedMLP, Linear
from wanda_fast.prune.sq_norm import SquaredNorm

SEQUENCES, TOKENS = 8, 9  # one in so many; in an even number of tokens each sequence's first could always be


class DenseInputs:
    """The squared norm of `act(gate(x)) * up(x)`, for the down projection that reads it."""

    def __init__(self, mlp: GatedMLP, norm: SquaredNorm):
        self.mlp, self.norm = mlp, norm
        self.projections = {mlp.gate, mlp.up}
        self._seen = 0  # sequences, or tokens

    def add(self, x: Tensor) -> None:
        """x `[sequences, tokens, in]` or `[tokens, in]`, before either projection is pruned."""
        every = SEQUENCES if x.dim() > 2 else TOKENS
        part = x[-self._seen % every :: every]
        self._seen += len(x)
        if not part.numel():
            return
        outputs = [module.forward(part) for module in dict.fromkeys((self.mlp.gate, self.mlp.up))]
        gate, up = outputs[0].chunk(2, dim=-1) if self.mlp.fused else outputs
        self.norm.add(self.mlp.activation(gate) * up)


def dense_inputs(block: Block, statistic: Callable[[Linear], object]) -> dict[str, DenseInputs]:
    """By the name of each down projection whose statistic is a norm, beside a gate or up that is pruned."""
    mlps = {linear.gated.down: linear.gated for linear in block.linears if linear.gated is not None}
    found = {}
    for linear in block.linears:
        mlp = mlps.get(linear.module)
        if mlp is not None and isinstance(norm := statistic(linear), SquaredNorm):
            found[linear.name] = DenseInputs(mlp, norm)
    return found
