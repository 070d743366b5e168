"""Writes a model that was loaded from safetensors files under the names, dtypes and bytes that it had there.

Only what pruning changed is taken from the model. All else is copied from file to file: tensors that the
model does not take, and bits that the dtype of the computation does not hold.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint.conversions import find_conversions, in_merging_order, renaming
from wanda_fast.checkpoint.shards import TensorFiles, begin_tensors
from wanda_fast.errors import NotStreamableError


def names_on_disk(model: nn.Module, files: TensorFiles) -> dict[str, Tensor] | None:
    """Tensor name on disk -> its value in the model now, under the names and in the form of the files.

    Names that the model does not take are missing.

    Returns: None if a tensor of the model cannot be converted back to those of the files.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    stored, values = files.on_meta(files.location), {}
    try:
        for made in find_conversions(model, stored, model.dtype):
            made.require_inverse(stored)
            values |= made.to_disk({name: state[name] for name in made.targets})
    except NotStreamableError:
        return None
    return values


def unused_names(model: nn.Module, files: TensorFiles) -> list[str]:
    """Tensors on disk that the model does not take."""
    state = model.state_dict()
    rename = renaming(model, state)
    return [name for name in in_merging_order(files.location) if rename(name)[1] not in state]


def save_as_source(
    values: dict[str, Tensor],
    files: TensorFiles,
    read_as: torch.dtype,
    dtype: torch.dtype | None,
    folder: Path,
) -> list[Path]:
    """Write the shards of `files` again, with the values that differ.

    Args:
        values: by name on disk, as `names_on_disk`; converted by less than their dtype on disk.
        read_as: the dtype in which the model was loaded, before it was widened for the computation.
        dtype: of the floating-point values in the output; None: that on disk.
    Returns: the shards.
    """

    def parts(name: str, _tensor: Tensor) -> Iterator[Tensor]:
        if name not in values:
            yield from files.pieces(name)
            return
        stored = files.read([name])[name]
        yield changed_only(stored, values[name].cpu(), read_as, dtype if stored.is_floating_point() else None)

    shards = []
    for file in files.files:
        names = [name for name, where in files.location.items() if where == file]
        tensors = {name: files.on_meta([name], dtype if name in values else None)[name] for name in names}
        shards.append(folder / files.file_name(file))
        begin_tensors(shards[-1], tensors, parts)()
    return shards


def changed_only(
    stored: Tensor, value: Tensor, read_as: torch.dtype, dtype: torch.dtype | None = None
) -> Tensor:
    """`stored` in `dtype`, with the elements of `value` where it is no longer what was read of `stored`."""
    dtype = dtype or stored.dtype
    kept = stored.to(value.dtype) == value
    if stored.is_floating_point():
        # A value that was rounded to zero may be one that is pruned.
        kept |= (stored.to(read_as).to(value.dtype) == value) & (value != 0)
    return torch.where(kept, stored.to(dtype), value.to(dtype))
