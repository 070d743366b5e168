"""The format of packed checkpoints: names of files and tensors, and the entry in config.json.

docs/packed.md describes it. A weight NAME is stored as NAME.bits, NAME.values and perhaps NAME.offsets, the
fields of `wanda_kernels.PackedRows`.
"""

import json
import math
from dataclasses import dataclass

import torch

from wanda_fast.checkpoint.header import NAMES
from wanda_fast.errors import CheckpointError

KEY, METHOD, VERSION = "quantization_config", "wanda_packed", 1
# The file of a checkpoint that is not sharded; its index has this name and a suffix otherwise.
WEIGHTS = "model.safetensors"
# Dtypes of the weights that are packed, by their names in config.json.
PACKABLE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Keys of a packed file's metadata.
SOURCE_FILE, SOURCE_HEADER = "source_file", "source_header"
# Key of the metadata in the index of packed files.
SOURCE_INDEX = "source_index"
# How the entry in config.json begins.
ENTRY = f',\n  "{KEY}": '.encode()


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight as config.json describes it.

    Attributes:
        shape: of the dense weight, `[out, in]` or `[experts, out, in]`.
        values: shape of the tensor of values, `[out, kept]` or `[experts, out, kept]`; `[n]` if the rows have
            different numbers of values.
        dtype: of the weight.
    """

    shape: tuple[int, ...]
    values: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the dense weight."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def parts(self) -> dict[str, dict]:
        """What the header of a file has of the weight: field -> dtype and shape."""
        *rows, in_features = self.shape
        parts = {
            "bits": {"dtype": "U8", "shape": [*rows, math.ceil(in_features / 8)]},
            "values": {"dtype": NAMES[self.dtype], "shape": list(self.values)},
        }
        if len(self.values) == 1:
            parts["offsets"] = {"dtype": "I64", "shape": [math.prod(rows) + 1]}
        return parts

    def stored_names(self, name: str) -> list[str]:
        """The names of the weight's tensors in a file."""
        return [f"{name}.{part}" for part in self.parts]

    def described(self) -> dict:
        """The entry in config.json."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "values": list(self.values), "dtype": dtype}


def is_packed(config: dict) -> bool:
    """Whether a config.json names this format."""
    about = config.get(KEY)
    return isinstance(about, dict) and about.get("quant_method") == METHOD


def packed_weights(path: str, config: dict) -> dict[str, PackedWeight]:
    """The packed weights by name, as the config.json of the packed checkpoint `path` describes them.

    Raises: `CheckpointError` for another version, or an entry that describes no packed weight.
    """
    about = config[KEY]
    if about.get("version") != VERSION:
        raise CheckpointError(
            f"model {path} is packed in version {about.get('version')} of the format; this program reads "
            f"version {VERSION}"
        )
    if not isinstance(about.get("sharded"), bool):
        raise CheckpointError(
            f"model {path} is packed, and its config.json does not say whether it is sharded"
        )
    entries = about.get("weights")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"model {path} is packed, and its config.json describes no packed weight")
    return {name: _parsed(path, name, entry) for name, entry in entries.items()}


def _parsed(path: str, name: str, entry: object) -> PackedWeight:
    try:
        shape, values = tuple(map(int, entry["shape"])), tuple(map(int, entry["values"]))
        dtype = PACKABLE[entry["dtype"]]
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json of {path} describes {name} as {json.dumps(entry)}") from error
    has_weight = len(shape) in (2, 3) and min(shape) >= 1
    if len(values) == 1:
        fits = has_weight and 0 <= values[0] <= math.prod(shape)
    else:
        fits = has_weight and values[:-1] == shape[:-1] and 0 <= values[-1] <= shape[-1]
    if not fits:
        raise CheckpointError(
            f"config.json of {path} describes {name} as {list(shape)} with values {list(values)}, which do "
            f"not fit"
        )
    return PackedWeight(shape, values, dtype)


def packed_name(file: str) -> str:
    """The name of the packed file, or of the index, of a checkpoint's file.

    It differs, so that transformers finds no weights and refuses the folder. With weights missing in a
    model.safetensors it would give them random values.
    """
    rest = file.removeprefix("model")
    return f"packed{rest}" if rest != file else f"packed-{file}"


def with_packed(config: bytes, weights: dict[str, PackedWeight], sharded: bool) -> bytes:
    """A config.json with the entry of the packed weights at its end; all other bytes stay."""
    entries = {name: json.dumps(weight.described()) for name, weight in weights.items()}
    lines = ",\n".join(f"      {json.dumps(name)}: {entry}" for name, entry in entries.items())
    begin = (
        f'{{\n    "quant_method": "{METHOD}",\n    "version": {VERSION},\n'
        f'    "sharded": {json.dumps(sharded)},\n    "weights": {{\n'
    )
    body = config[: config.rindex(b"}")].rstrip()
    return body + ENTRY + f"{begin}{lines}\n    }}\n  }}".encode() + config[len(body) :]


def without_packed(config: bytes) -> bytes:
    """The config.json that `with_packed` was given.

    If another program has written the file since, the keys but not the bytes are the same.
    """
    content = json.loads(config)
    if not is_packed(content):
        return config
    del content[KEY]
    begin = config.rfind(ENTRY)
    if begin >= 0:
        entry = config[begin + len(ENTRY) :].decode()
        rest = entry[json.JSONDecoder().raw_decode(entry)[1] :]
        restored = config[:begin] + rest.encode()
        before = json.loads(restored)
        before.pop(KEY, None)  # null, in some models' files
        if before == content:
            return restored
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
