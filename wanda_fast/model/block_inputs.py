"""The inputs of the blocks: the hidden states of every sequence, and each block's other arguments."""

from collections.abc import Iterator, MutableMapping, MutableSequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from wanda_fast.model.block_forward import faster_forward
from wanda_fast.model.offload import Offload, Offloaded


@dataclass
class BlockCall:
    """The arguments of a block, without the hidden states."""

    args: tuple
    kwargs: dict

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for `hidden`, both `[samples, ...]`."""
        with faster_forward(hidden.device):
            output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple | list) else output


@dataclass
class BlockInputs:
    """The inputs of one block for all samples.

    Attributes:
        hidden: `[nsamples, seqlen, features]` of text, overwritten block by block; of images also of another
            rank, and with another shape in each chain of blocks.
        batch_size: samples per forward.
        calls: `calls[batch][block]`: the other arguments.
        samples: what the model's forward takes, if it has several chains of blocks.
        offload: made `hidden`.
        before: samples that other ranks have before these.
    """

    hidden: Tensor | Offloaded
    batch_size: int
    calls: list[list[BlockCall]]
    samples: Tensor | None = None
    offload: Offload | None = None
    before: int = 0

    def slices(self) -> Iterator[slice]:
        """The batches, as slices of `hidden`."""
        for start in range(0, len(self.hidden), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.hidden)))

    def batches(self, block: int) -> Iterator[tuple[slice, BlockCall]]:
        """The batches, with the arguments of block number `block`."""
        return ((batch, calls[block]) for batch, calls in zip(self.slices(), self.calls, strict=True))

    def advance_(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the outputs of `block`, which is the model's `index`-th."""
        for batch, call in self.batches(index):
            self.hidden[batch] = call.run(block, self.hidden[batch])

    def restore_(self, stored, first: int, end: int) -> None:
        """Overwrite hidden states by stored ones, a batch at a time.

        Args:
            stored: a safetensors slice with samples `first` to `end` of all ranks'.
        """
        # The file of a rank without samples can have the shape of an earlier stage.
        if max(first, self.before) >= min(end, self.before + len(self.hidden)):
            return
        shape = torch.Size((len(self.hidden), *stored.get_shape()[1:]))
        if shape != self.hidden.shape:
            self.hidden = self.offload.empty(shape, self.hidden.dtype)
        for batch in self.slices():
            begin, stop = max(batch.start + self.before, first), min(batch.stop + self.before, end)
            if begin < stop:
                own = slice(begin - self.before, stop - self.before)
                self.hidden[own] = stored[begin - first : stop - first]

    @property
    def has_containers(self) -> bool:
        """Whether blocks pass on more than hidden states, in a dict or list that several of them receive."""
        calls = [(call.args, call.kwargs) for batch in self.calls[:1] for call in batch]
        return any(map(_is_container, tree_leaves(calls)))

    def copy(self, offload: Offload) -> "BlockInputs":
        """A copy with its own hidden states and containers. All other arguments are shared."""
        hidden = offload.empty(self.hidden.shape, self.hidden.dtype)
        for batch in self.slices():
            hidden[batch] = self.hidden[batch]
        calls = [_with_own_containers(calls) for calls in self.calls]
        return BlockInputs(hidden, self.batch_size, calls, self.samples, offload, self.before)


def _with_own_containers(calls: list[BlockCall]) -> list[BlockCall]:
    """The calls of one forward, with containers copied. Blocks that share a container share its copy."""
    copies: dict[int, object] = {}

    def own(leaf: object) -> object:
        return deepcopy(leaf, copies) if _is_container(leaf) else leaf

    return [BlockCall(*tree_map(own, (call.args, call.kwargs))) for call in calls]


def _is_container(leaf: object) -> bool:
    """Whether blocks can pass on values in it, as Gemma 4's do with keys and values."""
    return isinstance(leaf, MutableMapping | MutableSequence)
