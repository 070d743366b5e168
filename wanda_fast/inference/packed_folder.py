"""A packed checkpoint's folder: what its configuration promises, and whether its files keep it."""

import math

import torch
from torch import Tensor

from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.errors import CheckpointError
from wanda_kernels import PackedRows

# Of `quantization_config` in config.json.
METHOD, VERSION = "wanda_packed", 1
FILE, INDEX = "packed.safetensors", "packed.safetensors.index.json"
PARTS = PackedRows._fields


def weights_file(folder: str, revision: str | None = None) -> str:
    """The name of the file to load: the index if there are several files.

    Args:
        folder: a folder, or a hub id.
    """
    from transformers.utils import cached_file

    options = dict(revision=revision, _raise_exceptions_for_missing_entries=False)
    return INDEX if cached_file(folder, INDEX, **options) else FILE


def require_version(version: object) -> None:
    """Raise `CheckpointError` if a later wanda_fast wrote the folder."""
    if version != VERSION:
        raise CheckpointError(
            f"the checkpoint is packed in version {version!r} of the format, this wanda_fast reads version "
            f"{VERSION}: update wanda_fast"
        )


def packed_shapes(name: str, about: dict) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of each part of a packed weight, by its name in the file.

    Args:
        about: the configuration's entry: the weight's `shape` and `dtype`, and the shape of its `values`.
    Raises: `CheckpointError` if the entry is broken.
    """
    try:
        *rows, columns = (int(size) for size in about["shape"])
        values, dtype = [int(size) for size in about["values"]], getattr(torch, about["dtype"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json does not describe packed weight {name}: {about!r}") from error
    found = {"bits": (torch.uint8, [*rows, -(-columns // 8)]), "values": (dtype, values)}
    if len(values) == 1:
        found["offsets"] = (torch.int64, [math.prod(rows) + 1])
    return {f"{name}.{part}": kind for part, kind in found.items()}


def require_parts(weights: dict[str, dict], files: TensorFiles) -> None:
    """Raise `CheckpointError` unless the files have all parts of these weights, as described."""
    needed = {
        part: kind for name, about in weights.items() for part, kind in packed_shapes(name, about).items()
    }
    if absent := [part for part in needed if part not in files.location]:
        raise CheckpointError(
            f"config.json names {len(weights)} packed weights, and the files lack {absent[0]}"
            + f" and {len(absent) - 1} more tensors" * (len(absent) > 1)
        )
    for part, tensor in files.on_meta(needed).items():
        dtype, shape = needed[part]
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"{part} is {got} in the file, {dtype} {shape} by config.json")


def require_consistent(name: str, packed: PackedRows, in_features: int) -> None:
    """Raise `CheckpointError` unless each row has as many values as bits: kernels rely on it."""
    bits, values, offsets = packed
    counts, expected = _ones(bits), values.shape[-1]
    if offsets is not None:
        expected = offsets.diff()
    ends = offsets is None or (int(offsets[0]) == 0 and int(offsets[-1]) == len(values))
    padding = bits[..., -1:] >> (in_features % 8 or 8)
    if not ends or padding.any() or (counts.flatten() != expected).any():
        raise CheckpointError(f"bits and values of {name} do not belong together: the file is damaged")


def _ones(bits: Tensor) -> Tensor:
    """Number of ones in each row."""
    pairs = bits - ((bits >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(-1)
