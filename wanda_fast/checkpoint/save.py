"""Writes models: folders that `from_pretrained` loads, and that are complete or do not exist.

A model is written to DIR.partial/model, which a rename turns into DIR. `save` writes a model in memory. A
streamed model's blocks are written by its output, and the rest by `save_outside` and `save_surroundings`.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from wanda_fast.checkpoint.atomic_write import sync_folder, write_atomically
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.conversions import Conversion
from wanda_fast.checkpoint.journal import RUN, partial_of
from wanda_fast.checkpoint.load import Checkpoint, first_line
from wanda_fast.checkpoint.meta_model import open_meta_model
from wanda_fast.checkpoint.packed.packing import pack_folder, prunable_names
from wanda_fast.checkpoint.save_as_source import names_on_disk, save_as_source
from wanda_fast.checkpoint.shards import TensorFiles, begin_tensors, join_files
from wanda_fast.checkpoint.surroundings import REPORT, copy_surroundings
from wanda_fast.errors import OutputError, ResumeError, WandaFastError
from wanda_fast.report.contents import Report
from wanda_fast.report.sweep import Sweep

logger = logging.getLogger(__name__)

# Subfolders of DIR.partial: the model that becomes DIR, and the folder that was DIR before.
MODEL, REPLACED = "model", "replaced"
# Subfolder with the dense model of which MODEL is packed.
DENSE = "dense"
# File with the reports of a sweep.
SWEEP = "wanda_fast_sweep.json"
# Bytes up to which a streamed model becomes one model.safetensors instead of a shard for each block.
ONE_FILE = 2**28


def require_empty(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Raise an error unless a model can be saved as `folder`.

    Args:
        overwrite: `folder` may have content, and an unfinished run may be dropped.
        resume: an unfinished run will be continued.
    Raises: `OutputError` if `folder` is not empty, is not a folder, or cannot be replaced by a rename;
        `ResumeError` if an unfinished run would be lost.
    """
    partial = partial_of(folder)
    if (partial / RUN).is_file() and not (overwrite or resume):
        raise ResumeError(
            f"{partial} holds an unfinished run: continue it with --resume, or drop it with --overwrite"
        )
    if folder.is_symlink() or os.path.ismount(folder):
        kind = "a symbolic link" if folder.is_symlink() else "a mount point"
        raise OutputError(
            f"output {folder} is {kind}, which a rename cannot replace: name a folder of its own"
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {folder} exists and is not a folder")
    if folder.is_dir() and not overwrite and (count := len(list(folder.iterdir()))):
        other = " and holds no finished run of this recipe" if resume else ""
        raise OutputError(
            f"output folder {folder} is not empty ({count} entries){other}: name another, or pass --overwrite"
        )


def require_free(file: Path, overwrite: bool) -> None:
    """Raise `OutputError` if `file` cannot be written, or exists and must not be overwritten."""
    parent = next(folder for folder in file.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"output {file} cannot be written: {parent} is not a writable folder")
    if file.exists() and not file.is_file():
        raise OutputError(f"output {file} exists and is not a regular file")
    if file.exists() and not overwrite:
        raise OutputError(f"output file {file} exists: name another, or pass --overwrite")


def require_outside(mask: Path, folder: Path) -> None:
    """Raise `OutputError` if `mask` is inside the model's `folder`, or inside its DIR.partial."""
    if any(mask.resolve().is_relative_to(taken.resolve()) for taken in (folder, partial_of(folder))):
        raise OutputError(
            f"mask file {mask} is in {folder}, whose files are read as weights: name a file beside it"
        )


def save(checkpoint: Checkpoint, folder: Path, report: Report | None = None, packed: bool = False) -> None:
    """Write model, tokenizer and report to `folder`. Raises: `OutputError` as `save_folder`."""

    def fill(model: Path) -> None:
        dense = partial_of(folder) / DENSE if packed else model
        dense.mkdir(exist_ok=True)
        copied = _save_model(checkpoint, dense)
        if packed:
            _pack(dense, model, report)
        if report is not None:
            report.copied = copied
            save_report(report, model)

    save_folder(folder, fill)


def _pack(dense: Path, folder: Path, report: Report | None) -> None:
    """Pack the saved model `dense` into `folder`. If that fails, it becomes `folder`, with a warning."""
    try:
        opened = open_meta_model(str(dense), device="any", with_tokenizer=False)
        sizes = pack_folder(opened.files, prunable_names(opened), folder)
    except (WandaFastError, OSError) as error:  # a full disk too: nothing may be lost
        warn_of_dense(error, report)
        shutil.rmtree(folder)
        dense.rename(folder)
        return
    if report is not None:
        report.packed = asdict(sizes)


def warn_of_dense(error: Exception, report: Report | None) -> None:
    """Say that the output is dense, though it was to be packed, and why."""
    sentence = f"the output is written dense, not packed: {error}"
    logger.warning("%s", sentence)
    if report is not None:
        report.warnings.append(sentence)


def save_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write DIR.partial/model, then rename it to `folder`.

    Raises: `OutputError` if it cannot be written. If only the rename failed, the model is kept.
    """
    partial = partial_of(folder)
    model = partial / MODEL
    with writing(folder):
        restore_replaced(folder)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.mkdir(parents=True)
            fill(model)
            sync_folder(model, files=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    with writing(folder, f"; the model is kept in {model}"):
        move_into_place(model, folder)
    shutil.rmtree(partial, ignore_errors=True)


def _save_model(checkpoint: Checkpoint, folder: Path) -> dict[str, list[str]]:
    """Write weights, configurations and tokenizer: as in the checkpoint's files, if it has files.

    Returns: as `save_surroundings`.
    """
    files = checkpoint.files
    values = None if files is None else names_on_disk(checkpoint.model, files)
    if values is not None:
        shards = save_as_source(values, files, checkpoint.dtype, checkpoint.requested, folder)
        if len(shards) > 1:
            _save_index(TensorFiles.of(shards), folder)
        copied = copy_surroundings(files.folder, folder, checkpoint.requested)
        return {"tensors": checkpoint.unused, "files": copied}
    if files is not None:
        logger.warning(
            "%s: the output has transformers' names of tensors, not the checkpoint's", files.folder
        )
    with _stored_dtypes(checkpoint):
        checkpoint.model.save_pretrained(folder)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save_pretrained(folder)
    return {}


def move_into_place(model: Path, folder: Path) -> None:
    """Rename `model`, which must be on disk completely, to `folder`; an earlier `folder` is set aside."""
    if folder.exists():
        os.replace(folder, partial_of(folder) / REPLACED)
    try:
        os.replace(model, folder)
    except OSError:
        restore_replaced(folder)
        raise
    sync_folder(folder.parent)


def restore_replaced(folder: Path) -> None:
    """Put back the earlier `folder` if a run was killed between the two renames of `move_into_place`."""
    replaced = partial_of(folder) / REPLACED
    if replaced.exists() and not folder.exists():
        with writing(folder):
            os.replace(replaced, folder)


@contextmanager
def _stored_dtypes(checkpoint: Checkpoint) -> Iterator[None]:
    """Context in which tensors that were widened for the computation have their dtype on disk again.

    They are converted one by one, because there may be no memory for two copies of the model. The conversion
    is exact: weights came from that dtype, or were rounded to it when they were updated.
    """
    state = checkpoint.model.state_dict(keep_vars=True)
    widened = {name: state[name].dtype for name in checkpoint.dtypes}
    try:
        for name, dtype in checkpoint.dtypes.items():
            state[name].data = state[name].data.to(dtype)
        yield
    finally:
        for name, dtype in widened.items():
            state[name].data = state[name].data.to(dtype)


def save_outside(source: StreamedModel, shard: Path, abandoned: Callable[[], bool]) -> None:
    """Copy the tensors outside of the blocks, which pruning does not change, from file to file.

    Those that the model does not take are copied too. A dtype that the caller named is that of the others.

    Raises: `InterruptedError` between two pieces of 4 MiB once `abandoned()` is true.
    """
    meta_model, files = source.meta_model, source.meta_model.files
    dtypes = {name: meta_model.requested for name in source.copied}
    dtypes |= dict.fromkeys(meta_model.unused)
    plain = {name: made for made in source.dequantized for name in made.outputs}

    def pieces(name: str, _tensor: Tensor) -> Iterator[Tensor]:
        whole = [_dequantized(plain[name], files, meta_model.requested)[name]] if name in plain else None
        for piece in whole or files.pieces(name, dtypes[name]):
            if abandoned():
                raise InterruptedError(f"{shard} was abandoned")
            yield piece

    tensors = files.on_meta(source.copied, meta_model.requested) | files.on_meta(meta_model.unused)
    for made in source.dequantized:
        tensors |= _dequantized(made, files, meta_model.requested, meta=True)
    begin_tensors(shard, tensors, pieces)()


def _dequantized(
    made: Conversion, files: TensorFiles, dtype: torch.dtype | None, meta: bool = False
) -> dict[str, Tensor]:
    """The output's tensors of a conversion that dequantises, by name; on the meta device with `meta`."""
    stored = files.on_meta(made.sources) if meta else files.read(made.sources)
    return {name: t.to(dtype or t.dtype) for name, t in made.to_disk(made.to_model(stored)).items()}


def save_surroundings(source: StreamedModel, folder: Path, shards: list[Path]) -> dict[str, list[str]]:
    """Copy the small files, and write the index of the shards, which must be in `folder` already.

    Returns: the names of "tensors" that the model does not take, and of "files" that were copied.
    """
    meta_model = source.meta_model
    plain = any(made.written for made in meta_model.conversions)
    dtype = meta_model.dtype if plain else meta_model.requested
    copied = copy_surroundings(meta_model.files.folder, folder, dtype, plain)
    _save_index(TensorFiles.of(shards), folder)
    return {"tensors": meta_model.unused, "files": copied}


def _save_index(shards: TensorFiles, folder: Path) -> None:
    """Write the index, or join the shards to one file if they are small."""
    if shards.nbytes() <= ONE_FILE:
        join_files(shards, folder / "model.safetensors")
        for shard in shards.files:
            shard.unlink()
        return
    weight_map = {name: shard.name for name, shard in sorted(shards.location.items())}
    index = {"metadata": {"total_size": shards.nbytes()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def save_logs(report: Report, folder: Path | None, file: Path | None) -> None:
    """Write the published code's log line and the report: to two files in `folder`, and to the one `file`."""
    if folder is not None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            log = folder / f"log_{report.recipe['prune_method']}.txt"
            log.write_text(report.published_log(), encoding="utf-8")
            save_report(report, folder)
    if file is not None:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            text = report.published_log() + "\n" + report.to_json()
            write_atomically(file, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def save_report(report: Report, folder: Path) -> None:
    """Write the report into a model's folder."""
    with writing(folder):
        write_atomically(folder / REPORT, lambda file: file.write_text(report.to_json(), encoding="utf-8"))


def save_sweep(sweep: Sweep, folder: Path) -> None:
    """Write the reports of a sweep into `folder`."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SWEEP, lambda file: file.write_text(sweep.to_json(), encoding="utf-8"))


@contextmanager
def writing(path: Path, afterwards: str = "") -> Iterator[None]:
    """Turn a failed write into an `OutputError` on `path`, whose message ends with `afterwards`."""
    try:
        yield
    # These are OSErrors too, with a sentence of their own.
    except WandaFastError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(f"output {path} cannot be written: {first_line(error)}{afterwards}") from error
