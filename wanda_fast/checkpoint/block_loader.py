"""Blocks from a checkpoint's files, one in memory at a time and the next one being read."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint.meta_model import Skeleton
from wanda_fast.checkpoint.shards import mapped_memory, pinned_memory
from wanda_fast.memory import give_back_freed
from wanda_fast.model.architecture import Block
from wanda_fast.timer import Clock
from wanda_kernels.native.reused_memory import empty


@dataclass
class Stored:
    """Tensors for the output, on the host.

    Attributes:
        is_copy: they stay as they are when the block goes on.
        arrived: waits until they are there, from any thread.
    """

    tensors: dict[str, Tensor]
    is_copy: bool = False
    arrived: Callable[[], object] = lambda: None


class StreamedModel:
    """A checkpoint on disk. A thread reads one block ahead; what was lent leaves no weights behind."""

    def __init__(self, skeleton: Skeleton, blocks: list[Block], device: torch.device, clock: Clock):
        self.model, self.blocks, self.device, self.clock = skeleton.model, blocks, device, clock
        self.skeleton, self.dtype = skeleton, skeleton.model.dtype
        self.names = [self._names_under(block.name + ".") for block in blocks]
        inside = {name for names in self.names for name in names}
        self.outside = [name for name in skeleton.names if name not in inside]
        self._meta = skeleton.model.state_dict(keep_vars=True)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="wanda-fast-read")
        self._ahead: dict[int, Future] = {}

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        with self.clock.phase("read"):
            pending = self._ahead.pop(index, None) or self._reader.submit(self._read, self.names[index])
            tensors = pending.result()
            if index + 1 < len(self.blocks):
                self._ahead = {index + 1: self._reader.submit(self._read, self.names[index + 1])}
            self.place(tensors)
            _buffers_to(self.blocks[index].module, self.device)
            del tensors
        try:
            yield
        finally:
            self._forget(self.names[index])

    @contextmanager
    def surroundings(self, head: bool) -> Iterator[None]:
        names = self.outside if head else [name for name in self.outside if not self._only_head(name)]
        with self.clock.phase("read"):
            self.place(self._read(names))
            _buffers_to(self.model, self.device)
        try:
            yield
        finally:
            self._forget(names)

    def give_back(self) -> None:
        give_back_freed()

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def place(self, tensors: dict[str, Tensor]) -> None:
        """Give the model these tensors, by their names on disk, under all of their names in the model."""
        for name, tensor in tensors.items():
            # On the stream that computes, so in order with it. The tensor may be freed before it is copied:
            # torch's allocator of pinned memory gives it to nobody until that stream has passed the copy.
            moved = tensor.to(self.device, non_blocking=True)
            if tensor.is_floating_point():
                moved = _cast(moved, self.dtype)
            parameter = isinstance(self._meta[name], nn.Parameter)
            self._set(name, nn.Parameter(moved, requires_grad=False) if parameter else moved)

    def stored(self, names: list[str]) -> Stored:
        """These tensors as the output keeps them. Exact: kept weights came from that dtype, or were rounded
        to it when they were updated."""
        state = {name: self._get(name).detach() for name in names}
        dtype = self.skeleton.dtype
        state = {name: _cast(t, dtype) if t.is_floating_point() else t for name, t in state.items()}
        if self.device.type != "cuda":
            return Stored(state)
        copies = {name: torch.empty_like(t, device="cpu", pin_memory=True) for name, t in state.items()}
        for name, tensor in state.items():
            copies[name].copy_(tensor, non_blocking=True)
        return Stored(copies, True, torch.cuda.current_stream(self.device).record_event().synchronize)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """In the dtype of the checkpoint, as `from_pretrained` reads; pinned where a GPU will copy.

        Nothing here that torch computes with many threads: a thread of Python's gets a pool of its own, whose
        threads wait at work, on the cores of the forward.
        """
        memory = pinned_memory if self.device.type == "cuda" else mapped_memory
        return self.skeleton.files.read(names, self.skeleton.dtype, memory)

    def _names_under(self, prefix: str) -> list[str]:
        return [name for name in self.skeleton.names if name.startswith(prefix)]

    def _only_head(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        own = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()} if head is not None else ()
        return id(self._meta[name]) in own and len(self.skeleton.names[name]) == 1

    def _forget(self, names: list[str]) -> None:
        for name in names:
            self._set(name, self._meta[name])

    def _set(self, name: str, tensor: Tensor) -> None:
        for alias in self.skeleton.names[name]:
            owner, _, leaf = alias.rpartition(".")
            module = self.model.get_submodule(owner)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor

    def _get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`; on a CPU a copy takes memory again."""
    if tensor.dtype == dtype:
        return tensor
    return empty(*tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _buffers_to(module: nn.Module, device: torch.device) -> None:
    """Buffers that are computed, not loaded, join the weights."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = buffer.to(device)
