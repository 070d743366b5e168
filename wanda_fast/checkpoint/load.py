"""Loads models as a whole: Hugging Face ids, local folders, GGUF files."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from wanda_fast.checkpoint.dequantize import dequantizing, forget_quantization
from wanda_fast.checkpoint.journal import unfinished_run
from wanda_fast.checkpoint.model_class import model_class
from wanda_fast.checkpoint.packed.files import PackedFiles
from wanda_fast.checkpoint.packed.format import WEIGHTS, is_packed, packed_name, packed_weights
from wanda_fast.checkpoint.refusals import (
    odd_value,
    read_json,
    refuse_folder,
    refuse_quantized,
    refuse_unused,
)
from wanda_fast.checkpoint.save_as_source import unused_names
from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.errors import CheckpointError, NotStreamableError, QuantizedModelError
from wanda_fast.memory import out_of_memory_explained
from wanda_fast.model.block_forward import multiplies_bf16
from wanda_fast.model.block_lists import classifies_images

logger = logging.getLogger(__name__)

# What to do if loading runs out of memory.
WHOLE_MODEL = "this model is loaded as a whole: choose a 16-bit dtype, or a machine with more memory"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Missing tensors that a message names.
NAMED = 3
# Exceptions of transformers and torch for a checkpoint that they cannot load. Those in SPEAKING have messages
# that can be read without their type. The others come from a configuration that contradicts itself.
SPEAKING = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)
UNLOADABLE = (*SPEAKING, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)


@dataclass
class Checkpoint:
    """A loaded model.

    Attributes:
        tokenizer: None if the checkpoint has none.
        dtype: of the weights on disk.
        dtypes: the dtype on disk of each tensor, if they were widened for the computation; transformers keeps
            some tensors in another dtype than the model's.
        files: that the model came from; None: a GGUF file, or a model of the caller's.
        requested: the dtype that the caller named; None: each tensor keeps its own.
        unused: tensors of the files that the model does not take. They are copied to the output unchanged.
    """

    model: nn.Module
    tokenizer: object
    dtype: torch.dtype
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    files: TensorFiles | None = None
    requested: torch.dtype | None = None
    unused: list[str] = field(default_factory=list)

    def update_dtypes(self, weights: list[str]) -> dict[str, torch.dtype]:
        """By name of each weight, the dtype to which it is rounded when it is updated."""
        return {name: self.dtypes.get(name, self.dtype) for name in weights}


def load(
    path: str,
    dtype: str = "auto",
    cache_dir: str | None = None,
    device: str = "cpu",
    dequantize: bool = False,
) -> Checkpoint:
    """Load a causal LM and its tokenizer from a hub id, a folder, or a GGUF file (or the folder of one).

    Args:
        dtype: "float32", "float16", "bfloat16", or "auto": the checkpoint's own. With "auto", 16-bit weights
            are computed in float32 on a CPU without fast 16-bit arithmetic; they are still saved in the
            checkpoint's dtype.
        cache_dir: for downloads from the hub.
        device: where the model will run: "cpu" or "cuda".
        dequantize: read quantised weights as 16-bit ones.
    Raises: `CheckpointError` if it cannot be loaded, or lacks a tensor or has one of another shape;
        `OutOfMemoryError`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder, gguf = locate(path)
    options = {"cache_dir": cache_dir} | ({"gguf_file": gguf} if gguf else {})
    require_dtype(dtype)
    quantized = _refuse(path, folder, gguf, cache_dir, dequantize)
    # Tensors of another shape are reported this way, and refused below with their names.
    readable = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    readable |= {} if gguf else {"use_safetensors": True}
    try:
        with out_of_memory_explained(WHOLE_MODEL):
            kind, source = AutoModelForCausalLM, folder
            if not gguf:
                kind, given = _class_of(path, folder, cache_dir, quantized)
                readable |= given
                # transformers takes a name or tensors, not both.
                source = None if "state_dict" in given else folder
            model, found = kind.from_pretrained(
                source, dtype=DTYPES.get(dtype, "auto"), trust_remote_code=False, **readable, **options
            )
    except (CheckpointError, QuantizedModelError):
        raise
    except UNLOADABLE as error:
        odd = odd_value(read_json(folder, "config.json", cache_dir))
        raise CheckpointError(f"model {path} cannot be loaded: {odd}{first_line(error)}") from error
    if not quantized:
        refuse_unused(path, found["unexpected_keys"])
    _require_whole(path, found)
    tokenizer = None if classifies_images(model) else load_tokenizer(folder, **options)
    if gguf:
        _forget_quantization(model)
    model.config.name_or_path = folder
    loaded = Checkpoint(model.eval(), tokenizer, model.dtype, requested=DTYPES.get(dtype))
    if quantized:
        # These would quantise again when the model is saved.
        model._weight_conversions = None
    elif not gguf:
        _note_files(loaded, folder, cache_dir)
    if computed_in_float32(loaded.dtype, dtype, device):
        loaded.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        model.float()
    return loaded


def _refuse(path: str, folder: str, gguf: str | None, cache_dir: str | None, dequantize: bool) -> bool:
    """Raise an error if the checkpoint's files say that it cannot be loaded and pruned.

    Returns: whether its weights are to be dequantised.
    """
    quantized = refuse_folder(path, folder, gguf, cache_dir, dequantize)
    if not gguf and not quantized:
        try:
            refuse_quantized(path, tensor_files(folder, cache_dir))
        except NotStreamableError as error:
            raise CheckpointError(f"model {path} cannot be loaded: {error}") from error
    return quantized


def _class_of(path: str, folder: str, cache_dir: str | None, quantized: bool) -> tuple[type, dict]:
    """The class of a checkpoint, and keywords: its configuration if it is to dequantise the weights; that of
    the dense model and the dense tensors if it is packed."""
    from transformers import AutoConfig
    from transformers.models.auto.auto_factory import _get_model_class

    config = AutoConfig.from_pretrained(folder, cache_dir=cache_dir, trust_remote_code=False)
    kind, files = model_class(path, config), None if quantized else tensor_files(folder, cache_dir)
    if quantized:
        dequantizing(path, config)
        return kind, {"config": config}
    if isinstance(files, PackedFiles):
        forget_quantization(config)
        # The auto classes need a name, which excludes tensors.
        kind = _get_model_class(config, kind._model_mapping) if hasattr(kind, "_model_mapping") else kind
        return kind, {"config": config, "state_dict": files.read(files.location)}
    return kind, {}


def _note_files(loaded: Checkpoint, folder: str, cache_dir: str | None) -> None:
    try:
        loaded.files = tensor_files(folder, cache_dir)
    # transformers knows other names for files of weights.
    except NotStreamableError:
        return
    loaded.unused = unused_names(loaded.model, loaded.files)


def _require_whole(path: str, found: dict) -> None:
    """Raise `CheckpointError` if tensors were missing: transformers gives them random values."""
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
    """Raise `CheckpointError` unless `dtype` is "auto" or one of DTYPES."""
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")


def load_tokenizer(path: str, **options: object):
    """The tokenizer of a checkpoint; None, and a warning, if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except UNLOADABLE as error:
        logger.warning("no tokenizer in %s: %s", path, first_line(error))
        return None


def computed_in_float32(stored: torch.dtype, dtype: str, device: str) -> bool:
    """Whether weights of dtype `stored` on disk are computed in float32; see `load`."""
    # No kernel takes float64. Commands that compute nothing pass "any".
    slow = device == "cpu" and not _fast_on_cpu(stored)
    return dtype == "auto" and (slow or (stored == torch.float64 and device != "any"))


def locate(path: str) -> tuple[str, str | None]:
    """(folder or hub id, name of the GGUF file in it or None).

    Raises: `CheckpointError` if the path is local and has no model, several GGUF files, an unfinished run, or
        weights in pickles only.
    """
    local = Path(path).expanduser()
    if unfinished := unfinished_run(local):
        raise CheckpointError(f"model {path} is not finished: continue it with --resume ({unfinished})")
    if local.suffix == ".gguf":
        if not local.is_file():
            raise CheckpointError(f"model file {path} does not exist")
        return str(local.parent), local.name
    if not path or local.is_file():
        raise CheckpointError(f"model {path!r} is not a folder, a hub id or a .gguf file")
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


def tensor_files(folder: str, cache_dir: str | None) -> TensorFiles:
    """The checkpoint's tensors, dense ones also if it is packed; downloaded if the folder is a hub id.

    Raises: as `safetensors_of`; `CheckpointError` if a file or the description of packed weights is broken.
    """
    config = read_json(folder, "config.json", cache_dir)
    if not is_packed(config):
        return TensorFiles.of(safetensors_of(folder, cache_dir))
    weights = packed_weights(folder, config)
    return PackedFiles.of_packed(safetensors_of(folder, cache_dir, packed_name(WEIGHTS)), weights)


def safetensors_of(folder: str, cache_dir: str | None, name: str = WEIGHTS) -> list[Path]:
    """The checkpoint's safetensors files: the one with this name, or the shards that its index names.

    Raises: `NotStreamableError` if there is none; `CheckpointError` if there are only pickles.
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    options, error = dict(cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False), None
    try:
        if single := cached_file(folder, name, **options):
            return [Path(single)]
        if index := cached_file(folder, f"{name}.index.json", **options):
            return [Path(file) for file in get_checkpoint_shard_files(folder, index, cache_dir=cache_dir)[0]]
    except UNLOADABLE as caught:
        error = caught
    refuse_pickles(folder, cache_dir)
    missing = f"no {name}" if Path(folder).is_dir() else f"it is no folder, and the hub gave no {name}"
    raise NotStreamableError(first_line(error) if error else missing) from error


def refuse_pickles(repository: str, cache_dir: str | None) -> None:
    """Raise `CheckpointError` if a hub repository has pickles. Downloads nothing."""
    from transformers.utils import has_file

    for name in PICKLES:
        try:
            held = has_file(repository, name, cache_dir=cache_dir)
        # There is no such repository, which the caller finds out.
        except UNLOADABLE:
            return
        if held:
            raise _pickled(repository, name)


def _pickled(where: str, file: str) -> CheckpointError:
    return CheckpointError(
        f"model {where} holds its weights as pickles only ({file}), which can run code when they are read: "
        f"save it as safetensors"
    )


def _forget_quantization(model: nn.Module) -> None:
    """Remove the marks of GGUF from a model whose weights are dequantised: `save_pretrained` refuses them."""
    del model.config.quantization_config
    del model.hf_quantizer, model.quantization_method
    model.is_quantized = False


def _fast_on_cpu(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bf16())


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, and the next one if it ends with a colon.

    With the exception's type if that is not in SPEAKING, and the type alone for an empty message.
    """
    kind = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return kind
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if isinstance(error, SPEAKING) else f"{kind}: {line}"
