"""Packed weights that a model keeps in another form, e.g. all experts in one parameter: they are unpacked
while transformers loads them, before its own operations on them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key

import wanda_kernels
from wanda_fast.errors import PackedModelError
from wanda_kernels import PackedRows

UNPACK = "unpack the checkpoint with wanda-fast unpack, and load the dense one"
# The buffers of a `PackedLinear` are the linear's, not its weight's.
RENAMINGS = {rf"\.weight\.{part}$": f".{part}" for part in PackedRows._fields}


@dataclass
class Unpack(ConversionOps):
    """Makes dense weights of packed ones, then runs the operations of the converter that takes dense weights.

    Attributes:
        columns: the converter's pattern of a dense weight -> the weight's in_features.
        converter: None if the dense weight is the model's parameter as it is.
    """

    columns: dict[str, int]
    converter: WeightConverter | None = None
    # Of transformers: there are several patterns of names on disk, and maybe several of the model's.
    supports_many_to_many = True

    @torch.no_grad()
    def convert(self, input_dict: dict[str, list[Tensor]], full_layer_name: str, model, **kwargs) -> dict:
        dtype = model.state_dict()[full_layer_name].dtype
        tensors = dict(input_dict)
        for pattern, in_features in self.columns.items():
            parts = [tensors.pop(each, []) for each in part_patterns(pattern)]
            if parts[0]:
                tensors[pattern] = [each.to(dtype) for each in _dense(*parts, in_features)]
        if self.converter is None:
            return {full_layer_name: tensors.popitem()[1]}
        kwargs |= {name: getattr(self.converter, name) for name in ("source_patterns", "target_patterns")}
        for operation in self.converter.operations:
            tensors = operation.convert(tensors, full_layer_name=full_layer_name, model=model, **kwargs)
        return tensors


def _dense(
    bits: list[Tensor], values: list[Tensor], offsets: list[Tensor], in_features: int
) -> Iterator[Tensor]:
    # Weights whose rows have equally many values have no offsets.
    rest = iter(offsets)
    for each, kept in zip(bits, values, strict=True):
        packed = PackedRows(each, kept, next(rest) if kept.dim() == 1 else None)
        yield wanda_kernels.unpack_rows(packed, in_features)


def part_patterns(pattern: str) -> list[str]:
    """A pattern of names of dense weights -> those of the parts of packed ones, when they are renamed."""
    stem = re.sub(r"(\\?\.weight)?\$?$", "", pattern, count=1)
    return [rf"{stem}\.{part}$" for part in PackedRows._fields]


def unpacking_conversions(conversions: list, columns: dict[str, int]) -> tuple[list, dict[int, object]]:
    """transformers' renamings and converters for a packed checkpoint.

    Args:
        conversions: for the dense checkpoint.
        columns: name of each packed weight that is to be unpacked -> its in_features.
    Returns: the conversions; the id of each one that a dense checkpoint does not need -> the one that it
        replaces, or None.
    """
    renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern: dict[str, int] = {}
    own = [WeightRenaming(source, target) for source, target in RENAMINGS.items()]
    for name, in_features in columns.items():
        key, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            own.append(_converter({key: in_features}, [key]))
        elif by_pattern.setdefault(pattern, in_features) != in_features:
            found = f"{by_pattern[pattern]} and {in_features} columns"
            raise PackedModelError(f"transformers reads packed weights of {found} as one {key}: {UNPACK}")
    made, replaced = [], dict.fromkeys(map(id, own))
    for each in conversions:
        held = {pattern: by_pattern[pattern] for pattern in each.source_patterns if pattern in by_pattern}
        made.append(_converter(held, each.target_patterns, each) if held else each)
        if held:
            replaced[id(made[-1])] = each
    return made + own, replaced


def _converter(
    columns: dict[str, int], targets: list[str], dense: WeightConverter | None = None
) -> WeightConverter:
    # A dense weight's pattern can be the begin of a packed one's: packed ones come first.
    sources = [part for pattern in columns for part in part_patterns(pattern)]
    try:
        made = WeightConverter(
            sources + (dense.source_patterns if dense else []), targets, [Unpack(columns, dense)]
        )
    except ValueError as error:
        raise PackedModelError(
            f"transformers cannot make {targets[0]} of packed weights: {UNPACK}"
        ) from error
    if dense:
        made.scope_prefix, made.base_model_prefix = dense.scope_prefix, dense.base_model_prefix
    return made
