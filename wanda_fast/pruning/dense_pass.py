"""The dense pass: a block runs so that its linears' inputs are seen, and stops at the last linear's input."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import Tensor

from wanda_fast.model.architecture import Block
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.model.patching import forwards_replaced
from wanda_fast.pruning.gathering import BlockStatistics


class _Enough(Exception):
    """Ends a block's forward once the input of its last linear is known."""


def dense_pass(
    block: Block, statistics: BlockStatistics, inputs: BlockInputs, index: int, last_linear: dict[tuple, str]
) -> None:
    """Run the calibration through the model's block `index`, with the hooks of `statistics`.

    Args:
        last_linear: the linear that is called last, by the names of a block's linears. It is learned from
            the first block with these names, in whose first batch every linear must be called once.
    """
    kind = tuple(linear.name.removeprefix(block.name) for linear in block.linears)
    with statistics.gathering():
        for batch, call in inputs.batches(index):
            with _ending_at(block, last_linear.get(kind)):
                call.run(block.module, inputs.hidden[batch])
            calls = statistics.calls
            once = calls and sorted(calls) == sorted(linear.name for linear in block.linears)
            if once and not statistics.reads_output_of(calls[-1]):
                last_linear[kind] = calls[-1].removeprefix(block.name)


@contextmanager
def _ending_at(block: Block, linear: str | None) -> Iterator[None]:
    """Inside, a forward ends when the hooks of `linear` have seen its input. None: it runs to its end."""
    if linear is None:
        yield
        return

    def end(_x: Tensor) -> None:
        raise _Enough

    module = block.module.get_submodule(linear.removeprefix("."))
    with forwards_replaced({module: end}), suppress(_Enough):
        yield
