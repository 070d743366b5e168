"""One block's turn in the block loop."""

from dataclasses import dataclass, field

from wanda_fast.model.architecture import Block
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.report.contents import LinearReport
from wanda_fast.timer import Phases


@dataclass
class Turn:
    """One block's turn in the loop.

    Attributes:
        inputs: the block's inputs on the calibration; None for a method that needs none.
        reports: of its linears, once they are pruned.
    """

    index: int
    block: Block
    inputs: BlockInputs | None
    is_last: bool
    phases: Phases
    reports: dict[str, LinearReport] = field(default_factory=dict)
