"""The files around a checkpoint's weights: tokenizer, processors, licence. The output has the same bytes."""

import json
import logging
import shutil
from pathlib import Path

import torch

from wanda_fast.checkpoint.packed.format import without_packed
from wanda_fast.checkpoint.refusals import QUANTIZED_FILES, QUANTIZED_KEYS

logger = logging.getLogger(__name__)

CONFIG, REPORT = "config.json", "wanda_fast.json"
# Dense weights, in this format or another one, and the indexes of their shards.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data"}
INDEX = ".index.json"
# Bytes up to which a file is copied.
SMALL = 2**28


def copy_surroundings(
    source: Path, folder: Path, dtype: torch.dtype | None, dequantized: bool = False
) -> list[str]:
    """Copy the files of a checkpoint's folder, except its weights and what is hidden.

    config.json has the same bytes too, unless the weights have another dtype than the one it names, or are
    no longer quantised or packed.

    Args:
        source: the checkpoint's folder.
        folder: the output.
        dtype: that the weights were converted to; None: they were not.
        dequantized: whether they were quantised.
    Returns: the names of the copied files.
    """
    copied = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if not file.is_file() or name.parts[0].startswith(".") or str(name) in (CONFIG, REPORT):
            continue
        if dequantized and str(name) in QUANTIZED_FILES:
            continue
        if _is_weights(name) or file.stat().st_size > SMALL:
            if name.suffix != ".safetensors" and not name.name.endswith(INDEX):
                logger.warning("%s is not copied to the output: it holds weights that are not pruned", file)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
        copied.append(str(name))
    config = without_packed((source / CONFIG).read_bytes())
    config = without_quantization(config) if dequantized else config
    (folder / CONFIG).write_bytes(config_with_dtype(config, dtype))
    return copied


def config_with_dtype(config: bytes, dtype: torch.dtype | None) -> bytes:
    """A config.json whose "dtype" or "torch_dtype" is `dtype`, here and in the models inside of it.

    All other keys keep their values and their order; without a change the bytes are the same.
    """
    if dtype is None:
        return config
    content, name = json.loads(config), str(dtype).removeprefix("torch.")
    before = json.dumps(content)
    _set_dtype(content, name)
    # Every version of transformers reads this key.
    if "dtype" not in content:
        content["torch_dtype"] = name
    if json.dumps(content) == before:
        return config
    return _dumped(content)


def without_quantization(config: bytes) -> bytes:
    """A config.json that names no format of quantised weights. All other keys keep their order."""
    content = json.loads(config)
    for part in (content, *(part for part in content.values() if isinstance(part, dict))):
        part.pop(QUANTIZED_KEYS[0], None)
    return _dumped(content)


def _dumped(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(content: dict, name: str) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            _set_dtype(value, name)
        elif key in ("dtype", "torch_dtype") and value is not None:
            content[key] = name


def _is_weights(name: Path) -> bool:
    """Weights in a subfolder belong to another module, as a sentence embedding's last layer."""
    if name.suffix == ".safetensors":
        return len(name.parts) == 1
    return name.suffix in WEIGHTS or (len(name.parts) == 1 and name.name.endswith(INDEX))
