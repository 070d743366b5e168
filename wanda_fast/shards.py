"""Safetensors files: where each tensor lies, read by name, written so that a file is whole or not there."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHUNK = 2**22  # bytes read at once for a checksum
SAMPLE = 4096  # bytes of each tensor that a model's digest reads


@dataclass
class TensorFiles:
    """The tensors of a checkpoint. location: tensor name -> the file that holds it."""

    location: dict[str, Path]

    @classmethod
    def of(cls, files: Iterable[Path]) -> "TensorFiles":
        return cls({name: file for file in files for name in _header(file)[1]})

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies in ordinary memory, on the host; a file is mapped only while it is read."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.location[name], []).append(name)
        tensors = {}
        for file, held in wanted.items():
            with safe_open(file, framework="pt") as opened:
                for name in held:
                    stored = opened.get_tensor(name)
                    floating = dtype if stored.is_floating_point() else None
                    tensors[name] = stored.to(floating or stored.dtype, copy=True)
        return tensors

    @property
    def files(self) -> list[Path]:
        return sorted(set(self.location.values()), key=lambda file: file.name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        headers = [_header(file)[1] for file in self.files]
        return {name: tuple(about["shape"]) for header in headers for name, about in header.items()}

    def nbytes(self) -> int:
        headers = [_header(file)[1] for file in self.files]
        offsets = [about["data_offsets"] for header in headers for about in header.values()]
        return sum(end - begin for begin, end in offsets)

    def digest(self) -> str:
        """sha256 of every header and of 4 KiB from the middle of every tensor: tells fine-tunes apart without
        reading a model twice."""
        found = hashlib.sha256()
        for file in self.files:
            begin, header = _header(file)
            found.update(json.dumps(header, sort_keys=True).encode())
            with file.open("rb") as opened:
                for about in header.values():
                    first, end = about["data_offsets"]
                    opened.seek(begin + max(first, (first + end - SAMPLE) // 2))
                    found.update(opened.read(min(SAMPLE, end - first)))
        return found.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write, fsync, rename; returns the file's sha256."""
    metadata = {"format": "pt"}
    return write_atomically(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def join_files(shards: TensorFiles, path: Path) -> str:
    """Write the tensors of all shards as one file, by copying bytes: nothing is loaded; returns its sha256."""
    merged, sizes = {"__metadata__": {"format": "pt"}}, [0]
    for file in shards.files:
        for name, about in _header(file)[1].items():
            begin, end = (sum(sizes) + offset for offset in about["data_offsets"])
            merged[name] = about | {"data_offsets": [begin, end]}
        sizes.append(file.stat().st_size - _header(file)[0])
    header = json.dumps(merged).encode()
    header += b" " * (-len(header) % 8)  # the data begins aligned

    def write(partial: Path) -> None:
        with partial.open("wb") as joined:
            joined.write(len(header).to_bytes(8, "little") + header)
            for file in shards.files:
                with file.open("rb") as shard:
                    shard.seek(_header(file)[0])
                    shutil.copyfileobj(shard, joined, CHUNK)

    return write_atomically(path, write)


def write_atomically(path: Path, write: Callable[[Path], None]) -> str:
    """`write` fills a file of another name, which then takes `path`'s place at once; returns its sha256."""
    partial = path.with_name(path.name + ".tmp")
    write(partial)
    digest = sha256(partial)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)
    return digest


def sync_folder(folder: Path, files: bool = False) -> None:
    """Renames in a folder reach the disk with the folder; `files`: after all of its files."""
    for path in [*(folder.iterdir() if files else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _header(file: Path) -> tuple[int, dict[str, dict]]:
    """(where the data begins, tensor name -> dtype, shape, data_offsets)."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header
