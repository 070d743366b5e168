"""Safetensors files: finds tensors, reads them by name, and writes them part by part."""

import hashlib
import itertools
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from wanda_fast.checkpoint.atomic_write import CHUNK, begin_write, chunks, write_atomically
from wanda_fast.checkpoint.header import DTYPES, NAMES, bytes_needed, header_of, whole_header
from wanda_fast.errors import CheckpointError

# Bytes: a cache line, and the widest vector register.
ALIGNMENT = 64
# A model's digest reads SAMPLE bytes at SAMPLES places of each tensor.
SAMPLES, SAMPLE = 8, 4096


def mapped_memory(nbytes: int) -> Tensor:
    """uint8 `[nbytes]` that returns to the system when its last tensor is freed; malloc would keep a part."""
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]


def pinned_memory(nbytes: int) -> Tensor:
    """uint8 `[nbytes]` that a GPU can copy from asynchronously. torch reuses it for the next block."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


@dataclass
class TensorFiles:
    """The tensors of a checkpoint.

    Attributes:
        location: tensor name -> the file that contains it.
    """

    location: dict[str, Path]

    @classmethod
    def of(cls, files: Iterable[Path]) -> "TensorFiles":
        """The tensors in these files.

        Raises: `CheckpointError` if a file is missing or invalid, or ends before its last tensor.
        """
        return cls({name: file for file in files for name in whole_header(file)})

    def read(
        self,
        names: Iterable[str],
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        memory: Callable[[int], Tensor] = mapped_memory,
    ) -> dict[str, Tensor]:
        """Tensors on the host, by name.

        The files are read, not mapped: pages of a mapping would count as memory of this process, in addition
        to the tensors.

        Args:
            names: of the tensors.
            dtype: converts floating-point tensors, to one dtype or to one by name; None: that in the file.
            memory: allocates the given number of bytes as uint8; the tensors share this one allocation.
        Raises: `CheckpointError` if a file ends too early.
        """
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.location[name], []).append(name)
        headers = {file: header_of(file) for file in wanted}
        sizes = {name: _size(headers[file][1][name]) for file, held in wanted.items() for name in held}
        buffers = iter(memory(sum(sizes.values())).split(list(sizes.values())))
        tensors = {}
        for file, held in wanted.items():
            begin, header = headers[file]
            with file.open("rb", buffering=0) as opened:
                for name in held:
                    tensor = _read_tensor(opened, begin, header[name], next(buffers))
                    tensors[name] = converted(tensor, dtype[name] if isinstance(dtype, dict) else dtype)
        return tensors

    def pieces(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """The tensor of `read([name], dtype)` in flat pieces, each of 4 MiB in the file."""
        begin, header = header_of(self.location[name])
        about = header[name]
        first, end = about["data_offsets"]
        with self.location[name].open("rb", buffering=0) as opened:
            for offset in range(first, end, CHUNK):
                offsets = [offset, min(offset + CHUNK, end)]
                piece = {"dtype": about["dtype"], "shape": [-1], "data_offsets": offsets}
                buffer = torch.empty(CHUNK, dtype=torch.uint8)
                yield converted(_read_tensor(opened, begin, piece, buffer), dtype)

    @property
    def files(self) -> list[Path]:
        """All files, ordered by name."""
        return sorted(set(self.location.values()), key=lambda file: file.name)

    @property
    def folder(self) -> Path:
        """Where the files are, beside the checkpoint's other files."""
        return self.files[0].parent

    def on_meta(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The result of `read` on the meta device, from the headers alone."""
        headers = {file: header_of(file)[1] for file in self.files}
        found = {}
        for name in names:
            about = headers[self.location[name]][name]
            tensor = torch.empty(about["shape"], dtype=DTYPES[about["dtype"]], device="meta")
            found[name] = converted(tensor, dtype)
        return found

    def headers(self) -> dict[str, dict]:
        """Tensor name -> its dtype, shape and data_offsets in the file."""
        headers = [header_of(file)[1] for file in self.files]
        return {name: about for header in headers for name, about in header.items()}

    def dtypes(self) -> dict[str, str]:
        """Tensor name -> the name of its dtype in the file."""
        return {name: about["dtype"] for name, about in self.headers().items()}

    def file_name(self, file: Path) -> str:
        """The name of the file in which these tensors of `file` are saved again."""
        return file.name

    def unknown_dtypes(self) -> list[str]:
        """Names of dtypes in the files that this module does not know."""
        return sorted(set(self.dtypes().values()) - set(DTYPES))

    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(bytes_needed(about) for about in self.headers().values())

    @cached_property
    def digests(self) -> dict[str, str]:
        """Tensor name -> sha256 of name, dtype, shape, and 4 KiB at eight places, among them both ends.

        Tells fine-tuned models apart without reading them as a whole. Misses a change that is limited to
        other places. Read once: a file that changes during the run does not change them.
        """
        found = {}
        for file in self.files:
            begin, header = header_of(file)
            with file.open("rb") as opened:
                for name, about in header.items():
                    found[name] = _sampled(opened, begin, name, about)
        return found

    def digest(self, names: Iterable[str] | None = None) -> str:
        """sha256 of the `digests` of these tensors, in any order and in any files; None: of all."""
        chosen = sorted(self.location if names is None else names)
        return hashlib.sha256("".join(self.digests[name] for name in chosen).encode()).hexdigest()


def begin_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    parts: Callable[[str, Tensor], Iterable[Tensor]] = lambda _name, tensor: [tensor],
) -> Callable[[], str]:
    """Write a safetensors file under a temporary name.

    Args:
        tensors: by name; with `parts`, only their dtype, shape and nbytes are used.
        parts: splits a tensor into consecutive parts on the host, so that no copy of all of it is needed.
    Returns: a function that waits for the disk, renames the file to `path`, and returns its checksum.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = about
    contents = (bytes_of(part) for name, tensor in tensors.items() for part in parts(name, tensor))
    return begin_write(path, lambda unfinished: write_file(unfinished, header, contents))


def write_file(path: Path, header: dict[str, dict], contents: Iterable[memoryview]) -> None:
    """Write a safetensors file: the length of the header, the header, and the tensors' bytes.

    Args:
        header: tensor name -> dtype, shape and data_offsets.
        contents: the tensors' bytes, in the order of the header.
    """
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    # The data must be aligned to 8 bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as opened:
        for content in itertools.chain((len(text).to_bytes(8, "little"), text), contents):
            rest = memoryview(content)
            # One call writes at most 2 GiB.
            while len(rest):
                rest = rest[opened.write(rest) :]


def join_files(shards: TensorFiles, path: Path) -> str:
    """Copy the tensors of all shards into one file, 4 MiB at a time. Returns the file's checksum."""
    merged, size = {}, 0
    for file in shards.files:
        begin, header = header_of(file)
        for name, about in header.items():
            merged[name] = about | {"data_offsets": [size + offset for offset in about["data_offsets"]]}
        size += file.stat().st_size - begin
    contents = (chunk for file in shards.files for chunk in chunks(file, header_of(file)[0]))
    return write_atomically(path, lambda unfinished: write_file(unfinished, merged, contents))


def _size(about: dict) -> int:
    """Bytes of a tensor, rounded up so that the next one is aligned."""
    first, end = about["data_offsets"]
    return -(-(end - first) // ALIGNMENT) * ALIGNMENT


def _read_tensor(opened: BinaryIO, begin: int, about: dict, buffer: Tensor) -> Tensor:
    """Read a tensor into `buffer`, which is uint8 and at least as large."""
    first, end = about["data_offsets"]
    tensor = buffer[: end - first].view(DTYPES[about["dtype"]]).view(about["shape"])
    opened.seek(begin + first)
    rest = bytes_of(tensor)
    # One call reads at most 2 GiB.
    while len(rest):
        count = opened.readinto(rest)
        if not count:
            raise CheckpointError(f"{opened.name} ends before its last tensor: it is truncated")
        rest = rest[count:]
    return tensor


def _sampled(opened: BinaryIO, begin: int, name: str, about: dict) -> str:
    first, end = about["data_offsets"]
    found = hashlib.sha256(json.dumps([name, about["dtype"], about["shape"]]).encode())
    last = max(first, end - SAMPLE)
    for place in range(SAMPLES):
        opened.seek(begin + first + (last - first) * place // (SAMPLES - 1))
        found.update(opened.read(min(SAMPLE, end - first)))
    return found.hexdigest()


def converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host; a copy if the tensor is not contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
