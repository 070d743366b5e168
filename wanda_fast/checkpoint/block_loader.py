"""Loads blocks from a checkpoint's files. One block is in memory, and the next one is being read."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.checkpoint.own_dtypes import holds, pruned_original
from wanda_fast.checkpoint.shards import mapped_memory, pinned_memory
from wanda_fast.memory import release_freed_memory
from wanda_fast.model.architecture import Block
from wanda_fast.timer import Clock
from wanda_kernels.forward import empty


@dataclass
class Stored:
    """Tensors on the host, to be written to the output.

    Attributes:
        is_copy: whether they are a copy, which later work on the block does not change.
        arrived: waits until the copy is complete; can be called from any thread.
    """

    tensors: dict[str, Tensor]
    is_copy: bool = False
    arrived: Callable[[], object] = lambda: None


class StreamedModel:
    """The `BlockSource` of a checkpoint on disk. A thread reads one block ahead.

    The model is on the meta device. Weights are in it only inside the contexts `block` and `surroundings`.

    Attributes:
        names: for each block, its tensors' names on disk.
        outside: names of all other tensors on disk that the model reads.
        copied: names of all tensors on disk that are in no block.
    """

    def __init__(self, meta_model: MetaModel, blocks: list[Block], device: torch.device, clock: Clock):
        self.model, self.blocks, self.device, self.clock = meta_model.model, blocks, device, clock
        self.meta_model, self.dtype = meta_model, meta_model.model.dtype
        self.names = [self._names_under(block.name + ".") for block in blocks]
        inside = {name for names in self.names for name in names}
        self.outside = [name for name in meta_model.names if name not in inside]
        self._own = {name: t.dtype for name, t in meta_model.files.on_meta(meta_model.names).items()}
        self._prunable = {f"{linear.name}.weight" for block in blocks for linear in block.linears}
        self.copied = [name for name in meta_model.files.location if name not in inside]
        self._meta = meta_model.model.state_dict(keep_vars=True)
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
            self._unload(self.names[index])

    @contextmanager
    def surroundings(self, head: bool) -> Iterator[None]:
        names = self.outside if head else [name for name in self.outside if not self._only_head(name)]
        with self.clock.phase("read"):
            self.place(self._read(names))
            _buffers_to(self.model, self.device)
        try:
            yield
        finally:
            self._unload(names)

    def release_memory(self) -> None:
        """Return freed memory to the system, so that the peak stays at a few blocks."""
        release_freed_memory()

    def close(self) -> None:
        """Stop the reading thread."""
        self._reader.shutdown(cancel_futures=True)

    def place(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors into the model, under all of their names there.

        Args:
            tensors: by name on disk, on the host, in any floating-point dtype.
        """
        for name, tensor in tensors.items():
            # The copy is on the computing stream, so it is ordered before its users. The pinned tensor may be
            # freed earlier: torch's allocator does not reuse its memory until the stream has passed the copy.
            moved = tensor.to(self.device, non_blocking=True)
            if tensor.is_floating_point():
                moved = _cast(moved, self.dtype)
            parameter = isinstance(self._meta[name], nn.Parameter)
            self._set(name, nn.Parameter(moved, requires_grad=False) if parameter else moved)

    def stored(self, names: list[str]) -> Stored:
        """The model's tensors with these names on disk, in the output's dtype.

        The conversion is exact: weights came from that dtype, or were rounded to it when they were updated.
        On a GPU the tensors are copies that may be under way, on a CPU they can be the model's own.
        """
        again = self._not_held(names)
        state = {name: self._get(name).detach() for name in names if name not in again}
        state = {name: _cast(tensor, self._saved_dtype(name)) for name, tensor in state.items()}
        state |= self._from_files(again)
        if self.device.type != "cuda":
            return Stored(state)
        copies = {name: torch.empty_like(t, device="cpu", pin_memory=True) for name, t in state.items()}
        for name, tensor in state.items():
            copies[name].copy_(tensor, non_blocking=True)
        return Stored(copies, True, torch.cuda.current_stream(self.device).record_event().synchronize)

    def _saved_dtype(self, name: str) -> torch.dtype:
        own = self._own[name]
        return self.meta_model.requested or own if own.is_floating_point else own

    def _not_held(self, names: list[str]) -> list[str]:
        """Tensors whose values on disk are not all in the dtypes that they are read and computed in."""
        if self.meta_model.requested is not None:
            return []
        dtypes = {self.meta_model.dtype, self.dtype}
        floating = [name for name in names if self._own[name].is_floating_point]
        return [name for name in floating if not all(holds(dtype, self._own[name]) for dtype in dtypes)]

    def _from_files(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors as the checkpoint has them, with the model's zeros and updates if they are prunable."""
        tensors = {name: t.to(self.device) for name, t in self.meta_model.files.read(names).items()}
        for name in self._prunable.intersection(names):
            pruned = self._get(name).detach()
            tensors[name] = pruned_original(tensors[name], self.meta_model.dtype, pruned)
        return tensors

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors in the checkpoint's dtype, as `from_pretrained` reads them; in pinned memory for a GPU.

        Must not call torch functions that run on several threads. Each Python thread has its own pool of
        OpenMP threads, which would spin on the cores that the forward uses.
        """
        memory = pinned_memory if self.device.type == "cuda" else mapped_memory
        return self.meta_model.files.read(names, self.meta_model.dtype, memory)

    def _names_under(self, prefix: str) -> list[str]:
        return [name for name in self.meta_model.names if name.startswith(prefix)]

    def _only_head(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        own = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()} if head is not None else ()
        return id(self._meta[name]) in own and len(self.meta_model.names[name]) == 1

    def _unload(self, names: list[str]) -> None:
        for name in names:
            self._set(name, self._meta[name])

    def _set(self, name: str, tensor: Tensor) -> None:
        for alias in self.meta_model.names[name]:
            owner, _, leaf = alias.rpartition(".")
            module = self.model.get_submodule(owner)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor

    def _get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`; on a CPU the copy is in reused memory."""
    if tensor.dtype == dtype:
        return tensor
    return empty(*tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _buffers_to(module: nn.Module, device: torch.device) -> None:
    """Move the buffers that are computed, not loaded, to the device of the weights."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = buffer.to(device)
