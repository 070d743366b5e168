"""A block's dense weights are kept while several settings prune it, one after the other."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from wanda_fast.model.architecture import Block
from wanda_fast.pruning.selection import own_arithmetic


class DenseWeights:
    """A copy of the parameters of a block that hold its prunable weights."""

    def __init__(self, block: Block):
        self._block = block
        pruned = {linear.parameter for linear in block.linears}
        named = block.module.named_parameters(block.name, remove_duplicate=False)
        self._kept: dict[nn.Parameter, Tensor] = {
            parameter: parameter.data.clone() for name, parameter in named if name in pruned
        }

    @contextmanager
    def again(self) -> Iterator[None]:
        """Context at whose end, however it ends, the block is dense again."""
        try:
            yield
        finally:
            with own_arithmetic(self._block):
                for parameter, dense in self._kept.items():
                    parameter.data.copy_(dense)
