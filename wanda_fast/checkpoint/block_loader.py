"""Loads blocks from a checkpoint's files. One block is in memory, and the next one is being read."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint.conversions import Conversion
from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.checkpoint.own_dtypes import holds, pruned_original
from wanda_fast.checkpoint.shards import TensorFiles, mapped_memory, pinned_memory
from wanda_fast.distributed.ranks import Ranks
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
        copied: names of all tensors in no block that the output has as they are on disk.
        dequantized: conversions of the others in no block.
    """

    def __init__(
        self,
        meta_model: MetaModel,
        blocks: list[Block],
        device: torch.device,
        clock: Clock,
        ranks: Ranks | None = None,
    ):
        """
        Args:
            ranks: of one machine, which read parts of the tensors and send them to each other.
        """
        self.ranks = ranks or Ranks()
        self.model, self.blocks, self.device, self.clock = meta_model.model, blocks, device, clock
        self.meta_model, self.dtype = meta_model, meta_model.model.dtype
        self.names = [self._names_under(block.name + ".") for block in blocks]
        inside = {name for names in self.names for name in names}
        self.outside = [name for name in meta_model.names if name not in inside]
        quantized = [
            made for made in meta_model.conversions if made.written and made.sources[0] not in inside
        ]
        self.dequantized = quantized + meta_model.unused_quantized
        inside |= {name for made in self.dequantized for name in made.sources}
        self.copied = [name for name in meta_model.files.location if name not in inside]
        on_disk = meta_model.files.on_meta(meta_model.conversion)
        self._on_disk = on_disk
        # By name in the output.
        self._own = {
            name: made.dtype if made is not meta_model.conversion.get(name) else on_disk[name].dtype
            for name, made in meta_model.written.items()
        }
        weights = {linear.parameter for block in blocks for linear in block.linears}
        self._prunable = {
            name for name, made in meta_model.conversion.items() if not weights.isdisjoint(made.targets)
        }
        self._meta = meta_model.model.state_dict(keep_vars=True)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="wanda-fast-read")
        self._ahead: dict[int, Future] = {}

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        with self.clock.phase("read"):
            pending = self._ahead.pop(index, None) or self._begin_read(self.names[index])
            tensors = pending.result()
            if index + 1 < len(self.blocks):
                self._ahead = {index + 1: self._begin_read(self.names[index + 1])}
            self._place(self._from_all(tensors, self.names[index]))
            _buffers_to(self.blocks[index].module, self.device)
        try:
            yield
        finally:
            self._unload(self.names[index])

    @contextmanager
    def surroundings(self, head: bool) -> Iterator[None]:
        names = self.outside if head else [name for name in self.outside if not self._only_head(name)]
        with self.clock.phase("read"):
            self._place(self._from_all(self._begin_read(names).result(), names))
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

    def restore(self, shard: TensorFiles) -> None:
        """Put the tensors of a written block into the model."""
        made = self.meta_model.written
        self._place(self._read(list(shard.location), shard, made), made)

    def _place(self, tensors: dict[str, Tensor], made: dict[str, Conversion] | None = None) -> None:
        """Convert tensors to those of the model, and put them into it, under all of their names there.

        Args:
            tensors: as `_read` gives them, with the same `made`. It is emptied, so that a tensor is freed as
                soon as it is converted.
        """
        for conversion in self._conversions(tensors, made):
            # The copies are on the computing stream, so they are ordered before their users. Pinned tensors
            # may be freed earlier: torch's allocator does not reuse their memory until the stream has passed
            # the copies.
            moved = {
                name: tensors.pop(name).to(self.device, non_blocking=True) for name in conversion.sources
            }
            for name, tensor in conversion.to_model(moved).items():
                meta = self._meta[name]
                if tensor.is_floating_point():
                    tensor = _cast(tensor, meta.dtype)
                parameter = isinstance(meta, nn.Parameter)
                self._set(name, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)

    def stored(self, names: list[str]) -> Stored:
        """The model's tensors with these names on disk, as they are there, in the output's dtype.

        The conversion is exact: weights came from that dtype, or were rounded to it when they were updated.
        On a GPU the tensors are copies that may be under way, on a CPU they can be the model's own.
        """
        originals = self.meta_model.files.read(self._from_files(names))
        tensors = {}
        for conversion in self._conversions(names):
            made = self._written(conversion, originals)
            tensors |= made if self.device.type != "cuda" else _pinned_copies(made)
        tensors = {name: tensors[name] for name in [*names, *tensors] if name in tensors}
        if self.device.type != "cuda":
            return Stored(tensors)
        return Stored(tensors, True, torch.cuda.current_stream(self.device).record_event().synchronize)

    def _read(
        self,
        names: list[str],
        files: TensorFiles | None = None,
        made: dict[str, Conversion] | None = None,
    ) -> dict[str, Tensor]:
        """Tensors by name, on the host, as `from_pretrained` reads them; in pinned memory for a GPU.

        Must not call torch functions that run on several threads. Each Python thread has its own pool of
        OpenMP threads, which would spin on the cores that the forward uses.

        Args:
            files: that hold them; None: the checkpoint.
            made: their conversions by name; None: those of the checkpoint.
        """
        memory = pinned_memory if self.device.type == "cuda" else mapped_memory
        # Tensors that are converted are freed when they are, the others with the block.
        dtypes, groups, tensors, wanted = {}, {}, {}, set(names)
        for conversion in self._conversions(names, made):
            # Several ranks read parts of what a conversion takes.
            sources = [name for name in conversion.sources if name in wanted]
            dtypes |= dict.fromkeys(sources, conversion.read_as)
            groups.setdefault(conversion if conversion.converter else None, []).extend(sources)
        for group in groups.values():
            tensors |= (files or self.meta_model.files).read(group, dtypes, memory)
        return tensors

    def _begin_read(self, names: list[str]) -> Future:
        """Read this rank's part of the tensors in the background."""
        return self._reader.submit(self._read, self._parts(names)[self.ranks.rank])

    def _from_all(self, own: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """All tensors, of which this rank has read its own part."""
        if self.ranks.size == 1:
            return own
        tensors = {name: own.pop(name).to(self.device) for name in list(own)}
        for rank, part in enumerate(self._parts(names)):
            for name in part if rank != self.ranks.rank else ():
                about = self._as_read(name)
                tensors[name] = empty(*about.shape, dtype=about.dtype, device=self.device)
            self.ranks.send_([tensors[name] for name in part], rank)
        return {name: tensors[name] for name in names}

    def _parts(self, names: list[str]) -> list[list[str]]:
        """The names dealt to the ranks, in parts of about the same size."""
        parts, sizes = [[] for _ in range(self.ranks.size)], [0] * self.ranks.size
        for name in names:
            least = sizes.index(min(sizes))
            parts[least].append(name)
            sizes[least] += self._as_read(name).nbytes if self.ranks.size > 1 else 0
        return parts

    def _as_read(self, name: str) -> Tensor:
        """On the meta device, in the dtype in which it is read."""
        dtype = self.meta_model.conversion[name].read_as
        stored = self._on_disk[name]
        return stored.to(dtype) if dtype and stored.is_floating_point() else stored

    def _written(self, conversion: Conversion, originals: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the output has of a conversion, by name there.

        Args:
            originals: tensors as the checkpoint has them. They keep their bits, except for the model's zeros
                and updates if they are prunable.
        """
        own = {name: originals.pop(name).to(self.device) for name in conversion.sources if name in originals}
        prunable, made = not self._prunable.isdisjoint(conversion.sources), own
        if prunable or not own:
            made = conversion.to_disk({name: self._get(name).detach() for name in conversion.targets})
        if prunable:
            made |= {name: pruned_original(each, conversion.dtype, made[name]) for name, each in own.items()}
        return {name: _cast(made[name], self._saved_dtype(name)) for name in conversion.outputs}

    def _saved_dtype(self, name: str) -> torch.dtype:
        own = self._own[name]
        return self.meta_model.requested or own if own.is_floating_point else own

    def _from_files(self, names: list[str]) -> list[str]:
        """Those of the tensors that are read again when they are written.

        They are converted and not pruned, or their values on disk are not all in the dtypes that they are
        read and computed in.
        """
        return [name for name in names if self._is_converted(name) or not self._is_held(name)]

    def _is_converted(self, name: str) -> bool:
        conversion = self.meta_model.conversion[name]
        return bool(conversion.converter and not conversion.written and name not in self._prunable)

    def _is_held(self, name: str) -> bool:
        conversion = self.meta_model.conversion[name]
        if self.meta_model.requested or conversion.written or not self._own[name].is_floating_point:
            return True
        dtypes = {conversion.dtype, *(self._meta[target].dtype for target in conversion.targets)}
        return all(holds(dtype, self._own[name]) for dtype in dtypes)

    def _conversions(
        self, names: Iterable[str], made: dict[str, Conversion] | None = None
    ) -> list[Conversion]:
        made = made or self.meta_model.conversion
        return list(dict.fromkeys(made[name] for name in names))

    def _names_under(self, prefix: str) -> list[str]:
        return [name for name, made in self.meta_model.names.items() if made[0].startswith(prefix)]

    def _only_head(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        own = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()} if head is not None else ()
        made = self.meta_model.names[name]
        return len(made) == 1 and id(self._meta[made[0]]) in own

    def _unload(self, names: list[str]) -> None:
        for conversion in self._conversions(names):
            for name in conversion.targets:
                self._set(name, self._meta[name])

    def _set(self, name: str, tensor: Tensor) -> None:
        for alias in self.meta_model.aliases[name]:
            owner, _, leaf = alias.rpartition(".")
            module = self.model.get_submodule(owner)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor

    def _get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)


def _pinned_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {name: torch.empty_like(t, device="cpu", pin_memory=True) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        copies[name].copy_(tensor, non_blocking=True)
    return copies


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
