"""Models in and out: Hugging Face ids, local folders, GGUF files; folders that `from_pretrained` loads."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from wanda_fast.block_forward import multiplies_bf16
from wanda_fast.durable import sync_folder, write_atomically
from wanda_fast.errors import CheckpointError, OutputError, ResumeError, WandaFastError
from wanda_fast.journal import RUN, partial_of, unfinished_run
from wanda_fast.memory import out_of_memory_explained
from wanda_fast.report import Report

logger = logging.getLogger(__name__)

REPORT = "wanda_fast.json"
MODEL, REPLACED = "model", "replaced"  # in DIR.partial: what becomes DIR, and what was DIR
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
NAMED = 3  # of the tensors that a checkpoint lacks
# What transformers raises for what it cannot load.
UNLOADABLE = (OSError, ValueError, ImportError, KeyError, StrictDataclassError)


@dataclass
class Checkpoint:
    """A loaded model, its tokenizer (None where there is none), and the dtype of its weights on disk.

    Attributes:
        dtypes: of each tensor on disk, where they were widened for the computation: transformers keeps some
            in another than the model's.
    """

    model: nn.Module
    tokenizer: object
    dtype: torch.dtype
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def load(path: str, dtype: str = "auto", cache_dir: str | None = None, device: str = "cpu") -> Checkpoint:
    """Load a causal LM and its tokenizer from a hub id, a folder, or a GGUF file (or the folder of one).

    Args:
        dtype: "auto" keeps the checkpoint's own, but computes 16-bit weights in float32 on a CPU without
            fast 16-bit arithmetic (what is saved keeps the checkpoint's dtype); or "float32", "float16",
            "bfloat16".
    Raises: `CheckpointError`, also where the files lack a tensor of the model or hold one of another shape.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder, gguf = locate(path)
    options = {"cache_dir": cache_dir} | ({"gguf_file": gguf} if gguf else {})
    require_dtype(dtype)
    readable = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told, and refused below
    readable |= {} if gguf else {"use_safetensors": True}
    try:
        with out_of_memory_explained():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES.get(dtype, "auto"), **readable, **options
            )
    except (*UNLOADABLE, RuntimeError) as error:  # the latter: tensors that transformers cannot convert
        raise CheckpointError(f"model {path} cannot be loaded: {first_line(error)}") from error
    _require_whole(path, found)
    tokenizer = load_tokenizer(folder, **options)
    if gguf:
        _forget_quantization(model)
    loaded = Checkpoint(model.eval(), tokenizer, model.dtype)
    if computed_in_float32(loaded.dtype, dtype, device):
        loaded.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        model.float()
    return loaded


def _require_whole(path: str, found: dict) -> None:
    """Raise `CheckpointError` where transformers drew weights at random, as it does for what files lack."""
    wrong = [f"{name} is absent" for name in sorted(found["missing_keys"])]
    wrong += [
        f"{name} is {list(stored)} in the file, {list(needed)} in the model"
        for name, stored, needed in sorted(found["mismatched_keys"])
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise CheckpointError(
            f"model {path} lacks {len(wrong)} of its tensors: {'; '.join(wrong[:NAMED])}{more}"
        )


def require_dtype(dtype: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")


def load_tokenizer(path: str, **options: object):
    """The tokenizer of a checkpoint, or None, with a warning, where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except UNLOADABLE as error:
        logger.warning("no tokenizer in %s: %s", path, first_line(error))
        return None


def computed_in_float32(stored: torch.dtype, dtype: str, device: str) -> bool:
    """Whether weights of dtype `stored` are widened for the computation."""
    return dtype == "auto" and device == "cpu" and not _fast_on_cpu(stored)


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


def locate(path: str) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file name in it or None).

    Raises: `CheckpointError` for what cannot be a model.
    """
    local = Path(path).expanduser()
    if unfinished := unfinished_run(local):
        raise CheckpointError(f"model {path} is not finished: continue it with --resume ({unfinished})")
    if local.suffix == ".gguf":
        if not local.is_file():
            raise CheckpointError(f"model file {path} does not exist")
        return str(local.parent), local.name
    if not local.is_dir():
        if local.is_absolute() or path.startswith(("./", "../", "~")):
            raise CheckpointError(f"model folder {path} does not exist")
        return path, None
    if not any(local.iterdir()):
        raise CheckpointError(f"model folder {path} is empty")
    pickles = sorted(file.name for file in local.glob("*.bin"))
    if pickles and not any(local.glob("*.safetensors")) and not any(local.glob("*.gguf")):
        raise _pickled(f"folder {path}", pickles[0])
    gguf = sorted(file.name for file in local.glob("*.gguf"))
    if (local / "config.json").is_file() or not gguf:
        return str(local), None
    if len(gguf) > 1:
        raise CheckpointError(
            f"model folder {path} holds {len(gguf)} GGUF files ({', '.join(gguf)}): name one of them"
        )
    return str(local), gguf[0]


def refuse_pickles(repository: str, cache_dir: str | None) -> None:
    """Raise `CheckpointError` where a hub repository without safetensors has pickles; fetches neither."""
    from transformers.utils import has_file

    for name in PICKLES:
        try:
            held = has_file(repository, name, cache_dir=cache_dir)
        except UNLOADABLE:  # no such repository: whoever loads it says so
            return
        if held:
            raise _pickled(repository, name)


def _pickled(where: str, file: str) -> CheckpointError:
    return CheckpointError(
        f"model {where} holds its weights as pickles only ({file}), which can run code when they are read: "
        f"save it as safetensors"
    )


def _forget_quantization(model: nn.Module) -> None:
    """The weights are dequantised; without the marks of GGUF the model is what `save_pretrained` takes."""
    del model.config.quantization_config
    del model.hf_quantizer, model.quantization_method
    model.is_quantized = False


def _fast_on_cpu(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bf16())


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
