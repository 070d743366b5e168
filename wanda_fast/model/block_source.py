"""Where the block loop gets its blocks from: the interface, and the source for a model in memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from wanda_fast.model.architecture import Block
from wanda_fast.timer import Clock


class BlockSource(Protocol):
    """Provides a model's blocks, one at a time."""

    model: nn.Module
    blocks: list[Block]
    device: torch.device

    def block(self, index: int) -> AbstractContextManager[None]:
        """Context in which block `index` is on the device, with its weights."""

    def surroundings(self, head: bool) -> AbstractContextManager[None]:
        """Context in which the model's parts outside of the blocks have their weights.

        Args:
            head: whether the language-model head is needed as well.
        """

    def release_memory(self) -> None:
        """Return freed memory to the system, if this source keeps the peak low."""


class LiveModel:
    """A model in memory. Each block is moved to the device for its turn, and back to its own device after."""

    def __init__(self, model: nn.Module, blocks: list[Block], device: torch.device, clock: Clock):
        self.model, self.blocks, self.device, self.clock = model, blocks, device, clock

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        module = self.blocks[index].module
        home = next(module.parameters()).device
        try:
            with self.clock.phase("read"):
                module.to(self.device)
            yield
        finally:
            with self.clock.phase("write"):
                module.to(home)

    @contextmanager
    def surroundings(self, head: bool) -> Iterator[None]:
        """Nothing to do: the weights are in memory."""
        yield

    def release_memory(self) -> None:
        """Does nothing: the whole model is in memory, and the process may use its heap for other things."""


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which the whole model is on `device`. At the end it is where its first parameter was."""
    home = next(model.parameters()).device
    moves = home.type != device.type
    try:
        if moves:
            model.to(device)
        yield
    finally:
        if moves:
            model.to(home)
