"""Packs and unpacks the folder of a checkpoint: files of weights, index, config.json, and what is around."""

import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Set
from pathlib import Path

from wanda_fast.checkpoint.header import bytes_needed
from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.checkpoint.packed.files import PackedFiles
from wanda_fast.checkpoint.packed.format import (
    PACKABLE,
    SOURCE_INDEX,
    WEIGHTS,
    PackedWeight,
    packed_name,
    with_packed,
)
from wanda_fast.checkpoint.packed.writer import pack_file, unpack_file
from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.checkpoint.surroundings import CONFIG, REPORT, copy_surroundings
from wanda_fast.errors import CheckpointError, PackError
from wanda_fast.model.architecture import find_blocks
from wanda_fast.report.packed_sizes import PackedSizes
from wanda_fast.timer import Progress

logger = logging.getLogger(__name__)

INDEX = f"{WEIGHTS}.index.json"
# Times that a progress display is told how many tensors are done.
STEPS = 20


def prunable_names(opened: MetaModel) -> set[str]:
    """Names in the output of the weights that pruning can change."""
    weights = {linear.parameter for block in find_blocks(opened.model) for linear in block.linears}
    return {name for name, made in opened.written.items() if not weights.isdisjoint(made.targets)}


def pack_folder(
    files: TensorFiles, prunable: Set[str], folder: Path, progress: Progress | None = None
) -> PackedSizes:
    """Write the packed checkpoint of `files`, and of the files around them, into the empty `folder`.

    Args:
        prunable: names of the weights that are packed if that makes them smaller.
    Raises: `PackError` if none gets smaller; `CheckpointError` for a file that is not a checkpoint's.
    """
    weights: dict[str, PackedWeight] = {}
    tell = _teller(progress, "packing", len(files.location))
    for file in files.files:
        weights |= pack_file(file, prunable, folder, tell)
    if not weights:
        raise PackError(
            f"none of its {len(prunable)} prunable weights gets smaller when it is packed. That takes "
            f"{', '.join(PACKABLE)} and, in 16 bits, more than 6.25% of zeros, in 32 more than 3.125%"
        )
    if sharded := _is_sharded(files):
        _write_index(files.folder / INDEX, folder)
    copy_surroundings(files.folder, folder, None)
    for other in sorted(set(files.folder.glob("*.safetensors")) - set(files.files)):
        logger.warning("%s is not copied to the output: it is no part of the model", other)
    _copy_report(files.folder, folder)
    (folder / CONFIG).write_bytes(with_packed((folder / CONFIG).read_bytes(), weights, sharded))
    return _sizes(files, prunable, weights, folder)


def unpack_folder(files: PackedFiles, folder: Path, progress: Progress | None = None) -> None:
    """Write the checkpoint that was packed to `files`, with the same bytes, into the empty `folder`.

    Raises: `CheckpointError` for a file that is broken.
    """
    tell = _teller(progress, "unpacking", len(files.location))
    for file in files.files:
        unpack_file(files, file, folder, tell)
    if _is_sharded(files):
        (folder / INDEX).write_bytes(_source_index(files.folder / packed_name(INDEX)))
    copy_surroundings(files.folder, folder, None)
    _copy_report(files.folder, folder)


def _is_sharded(files: TensorFiles) -> bool:
    return files.files[0].name not in (WEIGHTS, packed_name(WEIGHTS))


def _write_index(source: Path, folder: Path) -> None:
    """Write the index of the packed files in `folder`, with the text of the dense files' index in it."""
    stored = TensorFiles.of(sorted(folder.glob("*.safetensors")))
    metadata = {"total_size": stored.nbytes(), SOURCE_INDEX: source.read_bytes().decode()}
    index = {"metadata": metadata, "weight_map": {name: file.name for name, file in stored.location.items()}}
    (folder / packed_name(INDEX)).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _source_index(index: Path) -> bytes:
    try:
        return json.loads(index.read_bytes())["metadata"][SOURCE_INDEX].encode()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} has no {SOURCE_INDEX}: it is no index of packed files") from error


def _copy_report(source: Path, folder: Path) -> None:
    if (source / REPORT).is_file():
        shutil.copyfile(source / REPORT, folder / REPORT)


def _teller(progress: Progress | None, phase: str, total: int) -> Callable[[str], None]:
    """A function that is called with each tensor's name, and shows about STEPS of them."""
    done = itertools.count()

    def tell(name: str) -> None:
        index = next(done)
        if progress and index % max(1, total // STEPS) == 0:
            progress.step(phase, index, total, name)

    return tell


def _sizes(
    files: TensorFiles, prunable: Set[str], weights: dict[str, PackedWeight], folder: Path
) -> PackedSizes:
    headers = {name: about for name, about in files.headers().items() if name in prunable}
    packed = [about for weight in weights.values() for about in weight.parts.values()]
    return PackedSizes(
        packed=len(weights),
        prunable=len(headers),
        dense_bytes=sum(weight.nbytes for weight in weights.values()),
        packed_bytes=sum(map(bytes_needed, packed)),
        prunable_bytes=sum(map(bytes_needed, headers.values())),
        prunable_numel=sum(math.prod(about["shape"]) for about in headers.values()),
        before=sum(file.stat().st_size for file in files.files),
        after=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
