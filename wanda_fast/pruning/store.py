"""The interface to what keeps pruned blocks."""

from typing import Protocol

from torch import Tensor

from wanda_fast.hidden_states import Activations
from wanda_fast.report.contents import LinearReport


class BlockStore(Protocol):
    """Keeps each block as soon as it is pruned, so that an interrupted run can go on behind the last one."""

    def begin_(self, activations: Activations) -> int:
        """The block to go on with, its inputs now in `activations`. All earlier blocks are held."""

    def holds(self, index: int) -> bool:
        """Whether an earlier run left block `index` pruned."""

    def reports(self, index: int, masks: dict[str, Tensor] | None) -> dict[str, LinearReport]:
        """The reports of a block that is held; its packed masks join `masks`."""

    def restore_block(self, index: int) -> None:
        """Give the model's block `index` its pruned weights."""

    def write_block(
        self, index: int, linears: dict[str, LinearReport], masks: dict[str, Tensor] | None
    ) -> None:
        """Keep block `index`, unless it is held already."""

    def reached(self, index: int, activations: Activations) -> None:
        """Every block before `index` is done, and its inputs are in `activations`."""


class KeepNothing:
    """The `BlockStore` of a run that cannot be resumed."""

    def begin_(self, activations: Activations) -> int:
        return 0

    def holds(self, index: int) -> bool:
        return False

    def write_block(
        self, index: int, linears: dict[str, LinearReport], masks: dict[str, Tensor] | None
    ) -> None: ...

    def reached(self, index: int, activations: Activations) -> None: ...
