"""Models out: a folder that `from_pretrained` loads, there as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from wanda_fast.checkpoint.atomic_write import sync_folder, write_atomically
from wanda_fast.checkpoint.journal import RUN, partial_of
from wanda_fast.checkpoint.load import Checkpoint, first_line
from wanda_fast.errors import OutputError, ResumeError, WandaFastError
from wanda_fast.report import Report

REPORT = "wanda_fast.json"
MODEL, REPLACED = "model", "replaced"  # in DIR.partial: what becomes DIR, and what was DIR


def require_empty(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Raise `OutputError` where `folder` exists and is not empty, unless it may be overwritten; `ResumeError`
    where an unfinished run would be lost."""
    partial = partial_of(folder)
    if (partial / RUN).is_file() and not (overwrite or resume):
        raise ResumeError(
            f"{partial} holds an unfinished run: continue it with --resume, or drop it with --overwrite"
        )
    if folder.is_symlink() or os.path.ismount(folder):
        kind = "a symbolic link" if folder.is_symlink() else "a mount point"
        raise OutputError(f"output {folder} is {kind}, which no rename replaces: name a folder of its own")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {folder} exists and is no folder")
    if folder.is_dir() and not overwrite and (count := len(list(folder.iterdir()))):
        other = " and holds no finished run of this recipe" if resume else ""
        raise OutputError(
            f"output folder {folder} is not empty ({count} entries){other}: name another, or pass --overwrite"
        )


def require_free(file: Path, overwrite: bool) -> None:
    """Raise `OutputError` where `file` exists, unless it may be overwritten, or cannot come to be."""
    parent = next(folder for folder in file.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"output {file} cannot be written: {parent} is no folder that may be written to")
    if file.exists() and not file.is_file():
        raise OutputError(f"output {file} exists and is no regular file")
    if file.exists() and not overwrite:
        raise OutputError(f"output file {file} exists: name another, or pass --overwrite")


def require_outside(mask: Path, folder: Path) -> None:
    """Raise `OutputError` where `mask` lies in the model's `folder`, or where that grows."""
    if any(mask.resolve().is_relative_to(taken.resolve()) for taken in (folder, partial_of(folder))):
        raise OutputError(
            f"mask file {mask} lies in {folder}, whose files are read as weights: name a file beside it"
        )


def save(checkpoint: Checkpoint, folder: Path, report: Report | None = None) -> None:
    """Write model, tokenizer and the report beside `folder`, then rename: it is whole or not there."""
    partial = partial_of(folder)
    model = partial / MODEL
    with writing(folder):
        put_back_replaced(folder)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.mkdir(parents=True)
            with _as_on_disk(checkpoint):
                checkpoint.model.save_pretrained(model)
            if checkpoint.tokenizer is not None:
                checkpoint.tokenizer.save_pretrained(model)
            if report is not None:
                save_report(report, model)
            sync_folder(model, files=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    with writing(folder, f"; the model is kept in {model}"):
        take_place(model, folder)
    shutil.rmtree(partial, ignore_errors=True)


def take_place(model: Path, folder: Path) -> None:
    """`model`, all of it on disk, becomes `folder` by one rename; what was there is set aside."""
    if folder.exists():
        os.replace(folder, partial_of(folder) / REPLACED)
    try:
        os.replace(model, folder)
    except OSError:
        put_back_replaced(folder)
        raise
    sync_folder(folder.parent)


def put_back_replaced(folder: Path) -> None:
    """Where a run was killed between the two renames of `take_place`, what was `folder` is it again."""
    replaced = partial_of(folder) / REPLACED
    if replaced.exists() and not folder.exists():
        with writing(folder):
            os.replace(replaced, folder)


@contextmanager
def _as_on_disk(checkpoint: Checkpoint) -> Iterator[None]:
    """Each tensor that was widened has its dtype on disk again, one after the other, for there may be no room
    for two. Exact: weights came from that dtype, or were rounded to it."""
    state = checkpoint.model.state_dict(keep_vars=True)
    widened = {name: state[name].dtype for name in checkpoint.dtypes}
    try:
        for name, dtype in checkpoint.dtypes.items():
            state[name].data = state[name].data.to(dtype)
        yield
    finally:
        for name, dtype in widened.items():
            state[name].data = state[name].data.to(dtype)


def save_logs(report: Report, folder: Path | None, file: Path | None) -> None:
    """`--save DIR`: the published log line and the report; `--save_log FILE`: both in one file."""
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
    with writing(folder):
        write_atomically(folder / REPORT, lambda file: file.write_text(report.to_json(), encoding="utf-8"))


@contextmanager
def writing(path: Path, afterwards: str = "") -> Iterator[None]:
    try:
        yield
    except WandaFastError:  # has its own sentence
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(f"output {path} cannot be written: {first_line(error)}{afterwards}") from error
