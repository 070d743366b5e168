"""Where the block loop gets its blocks from: the interface, and a model that is in memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from wanda_fast.model.architecture import Block
from wanda_fast.timer import Clock


class BlockSource(Protocol):
    """Lends a model's blocks, one at a time."""

    model: nn.Module
    blocks: list[Block]

    def block(self, index: int) -> AbstractContextManager[None]:
        """Context in which block `index` is on the device, with its weights."""

    def surroundings(self, head: bool) -> AbstractContextManager[None]:
        """Context in which everything but the blocks has its weights.

        Args:
            head: the language-model head too.
        """

    def give_back(self) -> None:
        """Return freed memory to the system, if this source keeps peaks low."""


class LiveModel:
    """A model in memory. A block visits the device, and returns pruned to the device it came from."""

    def __init__(self, model: nn.Module, blocks: list[Block], device: torch.device, clock: Clock):
        self.model, self.blocks, self.device, self.clock = model, blocks, device, clock

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        module = self.blocks[index].module
        home = next(module.parameters()).device
        with self.clock.phase("read"):
            module.to(self.device)
        try:
            yield
        finally:
            with self.clock.phase("write"):
                module.to(home)

    @contextmanager
    def surroundings(self, head: bool) -> Iterator[None]:
        yield

    def give_back(self) -> None:
        """Does nothing: the whole model is in memory anyway, and the process may hold much else."""
