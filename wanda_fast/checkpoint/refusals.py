"""Checkpoints that are refused as they are opened, before any work: each check raises one sentence.

Quantised weights, adapters, code of the repository, git-lfs pointers, truncated files.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from wanda_fast.checkpoint.dequantize import METHODS
from wanda_fast.checkpoint.packed.format import is_packed
from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.errors import AdapterError, CheckpointError, QuantizedModelError

# Keys of config.json, and files beside it, that describe quantised weights.
QUANTIZED_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
ADAPTER_FILE = "adapter_config.json"
# Names in a safetensors header of floating-point types of at most eight bits.
SMALL_FLOATS = ("F8_", "F6_", "F4")
SMALL_INTEGERS = ("U8", "I8")
# Parts of quantised weights: compressed-tensors, FP8, MXFP4, GPTQ and AWQ, bitsandbytes. Vision towers have
# scales of other names, which are no reason to refuse.
SCALE_NAME = re.compile(
    r"\.(weight|input|output|activation|q|k|v|kv)_(scale|zero_point|global_scale|packed|shape|g_idx)\w*$"
    r"|\.(scales|scale_inv|qweight|qzeros|qscales|g_idx|SCB|weight_format)$"
    r"|(_scales|_blocks|_scale_inv|proj_scale)$"
    r"|\.weight\.(nested_)?(absmax|quant_map)$|\.weight\.quant_state\."
)
ADAPTER_NAME = re.compile(
    r"(\.|^)(base_layer|ia3_l|lora_(A|B|E|embedding_A|embedding_B|magnitude_vector))(\.|$)"
)
MERGE = (
    "merge the adapter first "
    "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder))"
)
DEQUANTIZE = "pass --dequantize to prune them in 16 bits"
DEQUANTIZED = "prune the 16-bit original instead, and quantise the pruned model"
GIT_LFS = b"version https://git-lfs"
# Files that a model is loaded from.
LOADED = (".safetensors", ".json", ".model", ".gguf")


def refuse_folder(
    path: str, folder: str, gguf: str | None, cache_dir: str | None, dequantize: bool = False
) -> bool:
    """Raise an error if the files around the weights say that this program cannot prune the model.

    Args:
        path: what the user named; `folder`, `gguf`: where `load.locate` found it.
        dequantize: quantised weights are not refused if transformers can dequantise them.
    Returns: whether there are such weights.
    Raises: `CheckpointError` for a git-lfs pointer or code of the repository; `AdapterError`;
        `QuantizedModelError`.
    """
    _refuse_pointers(Path(folder), gguf)
    if gguf:
        return False
    _refuse_adapter(path, folder, cache_dir)
    config = read_json(folder, "config.json", cache_dir)
    named = False
    for where, part in _parts(config):
        for key in QUANTIZED_KEYS:
            if part.get(key) and not is_packed(part):
                named = key == QUANTIZED_KEYS[0] and _dequantizable(part[key])
                if not (named and dequantize):
                    raise _quantized(path, _format(part[key]), f"{key} in {where}", named)
    for file in QUANTIZED_FILES:
        if not named and (content := read_json(folder, file, cache_dir)):
            raise _quantized(path, _format(content.get("quantization") or content), file)
    _refuse_own_code(path, config)
    return named


def refuse_quantized(path: str, files: TensorFiles) -> None:
    """Raise `QuantizedModelError` if a stored tensor has at most eight bits, mask buffers excepted."""
    for name, dtype in files.dtypes().items():
        small = dtype in SMALL_INTEGERS and not name.endswith(".bias")
        if small or dtype.startswith(SMALL_FLOATS):
            raise _quantized(path, dtype, f"{name} in {files.location[name].name}")


def refuse_unused(path: str, unused: Iterable[str]) -> None:
    """Raise an error if tensors that the model does not take are parts of quantised weights or adapters.

    Raises: `QuantizedModelError`; `AdapterError`.
    """
    for name in sorted(unused):
        if ADAPTER_NAME.search(name):
            raise AdapterError(f"model {path} holds {name}, a tensor of an adapter: {MERGE}")
        if SCALE_NAME.search(name):
            raise QuantizedModelError(
                f"model {path} holds {name}, a part of a quantised weight that the model does not use: "
                f"{DEQUANTIZED}"
            )


def read_json(folder: str, name: str, cache_dir: str | None) -> dict:
    """A JSON file of a folder or hub id; empty if there is none.

    Raises: `CheckpointError` if it is not a JSON object.
    """
    file = _find(folder, name, cache_dir)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def odd_value(config: dict) -> str:
    """The value of config.json that no model can be made of, as the begin of a sentence; "" if unknown."""
    for where, part in _parts(config):
        pad, vocabulary = part.get("pad_token_id"), part.get("vocab_size")
        if isinstance(pad, int) and isinstance(vocabulary, int) and not -vocabulary <= pad < vocabulary:
            return f"pad_token_id in {where} is {pad}, outside the vocabulary of {vocabulary}: "
        for key in ("dtype", "torch_dtype"):
            if isinstance(name := part.get(key), str) and not _is_float(name):
                return f"{key} in {where} is {name!r}, not the name of a floating-point dtype of torch: "
    return ""


def _is_float(name: str) -> bool:
    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def _find(folder: str, name: str, cache_dir: str | None) -> Path | None:
    from transformers.utils import cached_file

    if Path(folder).is_dir():
        file = Path(folder) / name
        return file if file.is_file() else None
    try:
        found = cached_file(folder, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no such repository, or no network: loading the model says so
        return None
    return found and Path(found)


def _refuse_pointers(folder: Path, gguf: str | None) -> None:
    files = [folder / gguf] if gguf else folder.iterdir() if folder.is_dir() else ()
    for file in sorted(files):
        if file.suffix in LOADED and file.is_file():
            with file.open("rb") as opened:
                if opened.read(len(GIT_LFS)) == GIT_LFS:
                    raise CheckpointError(
                        f"{file} is a git-lfs pointer of {file.stat().st_size} bytes, not the file itself: "
                        f"run git lfs pull in its folder"
                    )


def _refuse_adapter(path: str, folder: str, cache_dir: str | None) -> None:
    adapter = read_json(folder, ADAPTER_FILE, cache_dir)
    if adapter:
        kind, base = adapter.get("peft_type", "PEFT"), adapter.get("base_model_name_or_path")
        of = f" of {base}" if base else ""
        raise AdapterError(f"model {path} is a {kind} adapter{of} ({ADAPTER_FILE}): {MERGE}")


def _refuse_own_code(path: str, config: dict) -> None:
    """transformers would stop to ask whether it may run the code."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = config.get("auto_map")
    if not isinstance(classes, dict) or config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    code = (
        classes.get("AutoModelForCausalLM") or classes.get("AutoConfig") or next(iter(classes.values()), "")
    )
    raise CheckpointError(
        f"model {path} needs code of its own ({code}), which wanda-fast never runs: load the model in Python "
        f"with trust_remote_code=True, and pass it to wanda_fast.prune(model, ...)"
    )


def _parts(config: dict) -> list[tuple[str, dict]]:
    """config.json and the configurations in it, with their names."""
    inner = [(f"{key} of config.json", part) for key, part in config.items() if isinstance(part, dict)]
    return [("config.json", config), *inner]


def _format(about: object) -> str:
    """The format that a quantisation config names, or else its settings."""
    about = about if isinstance(about, dict) else {"quantization": about}
    named = [about.get(key) for key in ("quant_method", "quant_algo", "format", "fmt")]
    if names := [str(name) for name in named if name]:
        return " ".join(names)
    bits = about.get("bits") or about.get("w_bit")
    return f"{bits} bits" if bits else json.dumps(about)[:60]


def _dequantizable(about: object) -> bool:
    return isinstance(about, dict) and about.get("quant_method") in METHODS


def _quantized(path: str, form: str, where: str, dequantizable: bool = False) -> QuantizedModelError:
    remedy = f"{DEQUANTIZE}, or {DEQUANTIZED}" if dequantizable else DEQUANTIZED
    return QuantizedModelError(f"model {path} has quantised weights ({form}: {where}): {remedy}")
