"""The dense pass: a block runs so that its linears' inputs are seen, and stops at the last linear's input."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import nn

from wanda_fast.model.architecture import Block
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.model.patching import forwards_replaced
from wanda_fast.pruning.gathering import BlockStatistics


class _Enough(Exception):
    """Ends a block's forward once the input of its last linear is known."""


def dense_pass(
    block: Block, statistics: BlockStatistics, inputs: BlockInputs, index: int, last_stage: dict[tuple, str]
) -> None:
    """Run the calibration through the model's block `index`, with the hooks of `statistics`.

    Args:
        last_stage: the stage that is called last, by the names of a block's linears. It is learned from
            the first block with these names, in whose first batch every stage must be called once.
    """
    kind = tuple(linear.name.removeprefix(block.name) for linear in block.linears)
    stages = {stage.name.removeprefix(block.name): stage.module for stage in block.stages}
    with statistics.gathering():
        for batch, call in inputs.batches(index):
            with _ending_at(stages.get(last_stage.get(kind))):
                call.run(block.module, inputs.hidden[batch])
            calls = [name.removeprefix(block.name) for name in statistics.calls]
            once = calls and sorted(calls) == sorted(stages)
            if once and not statistics.reads_output_of(stages[calls[-1]]):
                last_stage[kind] = calls[-1]


@contextmanager
def _ending_at(module: nn.Module | None) -> Iterator[None]:
    """Inside, a forward ends when the hooks of `module` have seen its input. None: it runs to its end."""
    if module is None:
        yield
        return

    def end(*_: object) -> None:
        raise _Enough

    with forwards_replaced({module: end}), suppress(_Enough):
        yield
