"""Writes packed files, and the dense files that they were, with one tensor in memory at a time."""

import json
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from wanda_fast.checkpoint.atomic_write import chunks
from wanda_fast.checkpoint.header import header_of, parse_header, read_header, require_sizes
from wanda_fast.checkpoint.packed.files import PackedFiles, source_metadata
from wanda_fast.checkpoint.packed.format import (
    PACKABLE,
    SOURCE_FILE,
    SOURCE_HEADER,
    PackedWeight,
    packed_name,
)
from wanda_fast.checkpoint.shards import TensorFiles, bytes_of
from wanda_fast.errors import CheckpointError
from wanda_kernels import PackedRows, count_zeros, pack_rows


class TensorWriter:
    """Writes a safetensors file whose header is not known before its tensors.

    Args:
        opened: the empty file.
        room: bytes that are left for the header.
    """

    def __init__(self, opened: BinaryIO, room: int):
        self.opened, self.room = opened, room
        self.entries, self.end = {}, 0
        opened.seek(8 + room)

    def add(self, name: str, about: dict, contents: Iterable[bytes | memoryview]) -> None:
        """Write a tensor of the dtype and shape in `about`."""
        begin = self.end
        for content in contents:
            self.end += self.opened.write(content)
        offsets = [begin, self.end]
        self.entries[name] = {"dtype": about["dtype"], "shape": about["shape"], "data_offsets": offsets}

    def finish(self, metadata: dict[str, str], names: Iterable[str]) -> None:
        """Write the header, with the tensors in the order of `names`."""
        self.opened.seek(0)
        self.opened.write(self.room.to_bytes(8, "little"))
        # A header may end with spaces.
        self.opened.write(_text(metadata, {name: self.entries[name] for name in names}).ljust(self.room))


def pack_file(
    file: Path, prunable: Set[str], folder: Path, tell: Callable[[str], None]
) -> dict[str, PackedWeight]:
    """Write a checkpoint's file into `folder`, with the prunable weights packed that get smaller by it.

    Args:
        tell: is called with the name of each tensor before it is written.
    Returns: the packed weights, by name.
    """
    text, _ = read_header(file)
    begin, header = header_of(file)
    order = _in_data_order(header, str(file))
    if begin + sum(map(_nbytes, header.values())) != file.stat().st_size:
        raise CheckpointError(f"{file} has bytes that are in no tensor, which a packed file would not keep")
    metadata = {"format": "pt", SOURCE_FILE: file.name, SOURCE_HEADER: text.decode()}
    weights: dict[str, PackedWeight] = {}
    with (folder / packed_name(file.name)).open("wb") as opened:
        writer = TensorWriter(opened, _room(metadata, header, prunable, file.stat().st_size))
        for name in order:
            tell(name)
            packed = _packed(TensorFiles({name: file}).read([name])[name]) if name in prunable else None
            if packed is None:
                first, end = header[name]["data_offsets"]
                writer.add(name, header[name], chunks(file, begin + first, begin + end))
                continue
            weight = PackedWeight(
                tuple(header[name]["shape"]), tuple(packed.values.shape), packed.values.dtype
            )
            for part, about in weight.parts.items():
                writer.add(f"{name}.{part}", about, [bytes_of(getattr(packed, part))])
            weights[name] = weight
        stored = {name: weights[name].stored_names(name) if name in weights else [name] for name in header}
        writer.finish(metadata, (part for name in header for part in stored[name]))
    return weights


def unpack_file(files: PackedFiles, file: Path, folder: Path, tell: Callable[[str], None]) -> None:
    """Write the dense file that was packed to `file` into `folder`, with the same bytes.

    Raises: `CheckpointError` if the tensors are not those of the dense file's header.
    """
    text, where = source_metadata(file, SOURCE_HEADER).encode(), f"{SOURCE_HEADER} of {file}"
    header = parse_header(text, where)
    header.pop("__metadata__", None)
    require_sizes(header, where)
    _require_same(header, files, file)
    begin, stored = header_of(file)
    with (folder / files.file_name(file)).open("xb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for name in _in_data_order(header, where):
            tell(name)
            if name in files.weights:
                opened.write(bytes_of(files.read([name])[name]))
            else:
                first, end = stored[name]["data_offsets"]
                opened.writelines(chunks(file, begin + first, begin + end))


def _packed(weight: Tensor) -> PackedRows | None:
    """The weight packed; None if that takes as many bytes, or it is no matrix of a dtype that is packed."""
    if weight.dim() not in (2, 3) or weight.dtype not in PACKABLE.values() or not weight.numel():
        return None
    # Most weights that do not get smaller have no zeros to speak of.
    if weight.numel() / 8 >= int(count_zeros(weight.flatten(0, -2))) * weight.element_size():
        return None
    packed = pack_rows(weight)
    return packed if sum(part.nbytes for part in packed if part is not None) < weight.nbytes else None


def _room(metadata: dict[str, str], header: dict[str, dict], prunable: Set[str], nbytes: int) -> int:
    """Bytes that the header of a packed file takes at most, a multiple of 8.

    Shapes of parts are no longer than those of their weights, and no offset exceeds the dense file's size.
    """
    largest = {}
    for name, about in header.items():
        parts = PackedRows._fields if name in prunable else ()
        largest |= dict.fromkeys((name, *(f"{name}.{part}" for part in parts)), about)
    text = _text(
        metadata, {name: about | {"data_offsets": [nbytes, nbytes]} for name, about in largest.items()}
    )
    return -(-len(text) // 8) * 8


def _text(metadata: dict[str, str], entries: dict[str, dict]) -> bytes:
    return json.dumps({"__metadata__": metadata} | entries).encode()


def _in_data_order(header: dict[str, dict], where: str) -> list[str]:
    """The tensors in the order of their bytes. Raises: `CheckpointError` unless these follow each other."""
    order, end = sorted(header, key=lambda name: header[name]["data_offsets"]), 0
    for name in order:
        begin, after = header[name]["data_offsets"]
        if begin != end:
            raise CheckpointError(f"{where}: {name} begins at byte {begin}, not at {end}")
        end = after
    return order


def _nbytes(about: dict) -> int:
    first, end = about["data_offsets"]
    return end - first


def _require_same(header: dict[str, dict], files: PackedFiles, file: Path) -> None:
    """Raise `CheckpointError` unless the dense file's header names the tensors of `file`."""
    dense = files.headers()
    held = {name for name, where in files.location.items() if where == file}
    for name in sorted(held | header.keys()):
        found = _described(dense[name]) if name in held else "absent"
        wanted = _described(header[name]) if name in header else "absent"
        if found != wanted:
            raise CheckpointError(f"{file}: {name} is {found}, and {wanted} in its {SOURCE_HEADER}")


def _described(about: dict) -> str:
    return f"{about['dtype']} {about['shape']}"
