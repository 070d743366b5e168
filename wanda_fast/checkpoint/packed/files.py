"""Reads the files of packed checkpoints: their tensors are those of the dense checkpoint."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from wanda_fast.checkpoint.header import NAMES, read_header
from wanda_fast.checkpoint.packed.format import SOURCE_FILE, PackedWeight
from wanda_fast.checkpoint.shards import ALIGNMENT, TensorFiles, converted, mapped_memory
from wanda_fast.errors import CheckpointError
from wanda_kernels import PackedRows, unpack_rows

# Ones in each byte.
ONES = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


class PackedFiles(TensorFiles):
    """The tensors of a packed checkpoint, with dense ones in place of the packed weights.

    Attributes:
        stored: the tensors as they are in the files.
        weights: the packed weights by name.
    """

    def __init__(self, stored: TensorFiles, weights: dict[str, PackedWeight]):
        parts = {part: name for name, weight in weights.items() for part in weight.stored_names(name)}
        super().__init__({parts.get(name, name): file for name, file in stored.location.items()})
        self.stored, self.weights = stored, weights

    @classmethod
    def of_packed(cls, files: Iterable[Path], weights: dict[str, PackedWeight]) -> "PackedFiles":
        """The tensors in these files, whose packed weights config.json describes.

        Raises: `CheckpointError` as `of`, or if a tensor of a packed weight is missing or not as described.
        """
        stored = TensorFiles.of(files)
        headers = stored.headers()
        for name, weight in weights.items():
            for part, wanted in weight.parts.items():
                _require(f"{name}.{part}", headers, wanted, stored)
        return cls(stored, weights)

    def read(
        self,
        names: Iterable[str],
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        memory: Callable[[int], Tensor] = mapped_memory,
    ) -> dict[str, Tensor]:
        names = list(names)
        packed = [name for name in names if name in self.weights]
        tensors = self.stored.read([name for name in names if name not in self.weights], dtype, memory)
        sizes = [-(-self.weights[name].nbytes // ALIGNMENT) * ALIGNMENT for name in packed]
        for name, buffer in zip(packed, memory(sum(sizes)).split(sizes), strict=True):
            weight = self.weights[name]
            dense = buffer[: weight.nbytes].view(weight.dtype).view(weight.shape)
            unpack_rows(self.packed_rows(name), weight.shape[-1], out=dense)
            tensors[name] = converted(dense, dtype[name] if isinstance(dtype, dict) else dtype)
        return tensors

    def packed_rows(self, name: str) -> PackedRows:
        """A packed weight as it is stored. Raises: `CheckpointError` if its parts contradict each other."""
        weight = self.weights[name]
        stored = self.stored.read(weight.stored_names(name))
        rows = PackedRows(*(stored.get(f"{name}.{part}") for part in PackedRows._fields))
        if (wrong := fault(rows, weight.shape[-1])) is not None:
            raise CheckpointError(f"{self.location[name]}: {name} is broken: {wrong}")
        return rows

    def pieces(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        if name not in self.weights:
            yield from self.stored.pieces(name, dtype)
            return
        yield self.read([name], dtype)[name].flatten()

    def on_meta(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        names = list(names)
        found = self.stored.on_meta([name for name in names if name not in self.weights], dtype)
        for name in names:
            if weight := self.weights.get(name):
                found[name] = torch.empty(weight.shape, dtype=dtype or weight.dtype, device="meta")
        return {name: found[name] for name in names}

    def headers(self) -> dict[str, dict]:
        """As that of the dense checkpoint, without data_offsets of the packed weights."""
        stored, found = self.stored.headers(), {}
        for name in self.location:
            weight = self.weights.get(name)
            found[name] = (
                {"dtype": NAMES[weight.dtype], "shape": list(weight.shape)} if weight else stored[name]
            )
        return found

    def file_name(self, file: Path) -> str:
        """The name of the dense file that was packed to `file`.

        Raises: `CheckpointError` if it is none of a file in the same folder.
        """
        name = source_metadata(file, SOURCE_FILE)
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{file} names {name!r} as its {SOURCE_FILE}: that is no file of weights")
        return name

    @cached_property
    def digests(self) -> dict[str, str]:
        """As those of other files; of the stored tensors together, for a packed weight."""
        stored, found = self.stored.digests, {}
        for name in self.location:
            weight = self.weights.get(name)
            parts = weight.stored_names(name) if weight else [name]
            found[name] = hashlib.sha256("".join(stored[part] for part in parts).encode()).hexdigest()
        return found


def source_metadata(file: Path, key: str) -> str:
    """What a packed file's metadata has of the dense file. Raises: `CheckpointError` if it is missing."""
    metadata = read_header(file)[1].get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(key), str):
        raise CheckpointError(f"{file} is not a packed file: its metadata has no {key}")
    return metadata[key]


def _require(name: str, headers: dict[str, dict], wanted: dict, stored: TensorFiles) -> None:
    """Raise `CheckpointError` unless a tensor of a packed weight is in the files as config.json says."""
    if name not in headers:
        names = ", ".join(file.name for file in stored.files)
        raise CheckpointError(f"{stored.folder}: {name} is absent from {names}, though config.json needs it")
    about = headers[name]
    found = {key: about.get(key) for key in wanted}
    if found != wanted:
        raise CheckpointError(
            f"{stored.location[name]}: {name} is {found['dtype']} {json.dumps(found['shape'])}, config.json "
            f"needs {wanted['dtype']} {wanted['shape']}"
        )


def fault(rows: PackedRows, in_features: int) -> str | None:
    """What contradicts each other in a packed weight; None: nothing."""
    bits, values, offsets = rows
    if in_features % 8 and (bits[..., -1] >> in_features % 8).any():
        return f"its bits have ones after column {in_features}"
    found = ONES.to(bits.device)[bits.int()].sum(-1).flatten()
    wanted = torch.full_like(found, values.shape[-1]) if offsets is None else offsets.diff()
    if offsets is not None and (offsets[0] != 0 or offsets[-1] != len(values)):
        return f"its offsets run from {offsets[0]} to {offsets[-1]}, it has {len(values)} values"
    if wrong := (found != wanted).nonzero().flatten().tolist():
        row = wrong[0]
        return f"row {row} has {found[row]} ones in its bits, and {wanted[row]} values"
    return None
