"""How transformers makes a model's tensors of those on disk: renamed, merged from experts, split, transposed.

Both ways are transformers' own operations. The way back begins at the converter: the names on disk are known,
so no renaming is reversed.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wanda_fast.errors import NotStreamableError, QuantizedModelError

# Operations that move values and change none.
MOVING = {"Chunk", "Concatenate", "Interleave", "MergeModulelist", "PermuteForRope", "Split"}
MOVING |= {"SplitModulelist", "Transpose", "Conv3dToLinear", "LinearToConv3d"}
# Exceptions of an operation on tensors that it cannot convert.
INCONVERTIBLE = (ValueError, RuntimeError, LookupError, TypeError, AttributeError)


@dataclass(eq=False)
class Conversion:
    """Tensors on disk that together make tensors of the model.

    Attributes:
        model: on the meta device.
        key: the first of the names in the model.
        converter: of transformers; None if one tensor is one of the model, under this name or another.
        patterns: name on disk -> the converter's pattern for it; in the order in which tensors are merged.
        renamed: the tensor's name when the converter takes over -> its name on disk.
        targets: names in the model.
        dtype: that transformers reads floating-point tensors in.
        written: how the output has the tensors if they are dequantised; None: as they are on disk.
    """

    model: nn.Module
    key: str
    converter: object | None
    patterns: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    dtype: torch.dtype | None = None
    written: "Conversion | None" = None

    @property
    def sources(self) -> list[str]:
        """Names on disk."""
        return list(self.patterns)

    @property
    def outputs(self) -> list[str]:
        """Names in the output."""
        return (self.written or self).sources

    @property
    def read_as(self) -> torch.dtype | None:
        """The dtype that tensors are converted to before all else; None: each keeps its own."""
        return None if self.written else self.dtype

    def to_model(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, by name; `stored`, by name on disk, loses what they are made of."""
        if self.converter is None:
            return {self.key: stored.pop(*self.patterns)}
        converter = deepcopy(self.converter)
        for name, pattern in self.patterns.items():
            converter.add_tensor(self.key, name, pattern, stored.pop(name))
        made = self._run(converter, self.key)
        return {name: t.detach().to(self.dtype) for name, t in made.items()} if self.written else made

    def to_disk(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_model`: tensors by name in the output, views of `values` where possible."""
        if self.written:
            return self.written.to_disk(values)
        if self.converter is None:
            return dict(zip(self.patterns, [values[self.key]], strict=True))
        reverse = self.converter.reverse_transform()
        for name in self.targets:
            key, pattern = reverse.rename_source_key(name)
            reverse.add_tensor(key, name, pattern, values[name])
        return {self.renamed[name]: tensor for name, tensor in self._run(reverse, key).items()}

    def require_inverse(self, stored: dict[str, Tensor]) -> None:
        """Raise `NotStreamableError` unless `to_disk` gives back the names and shapes of `stored`.

        Args:
            stored: all tensors on disk by name, on the meta device.
        """
        first, converter = self.outputs[0], (self.written or self).converter
        operations = {type(operation).__name__ for operation in getattr(converter, "operations", ())}
        if unknown := sorted(operations - MOVING):
            raise NotStreamableError(f"transformers' {unknown[0]} makes {self.key} of {first}")
        try:
            after = self.to_disk(self.to_model({name: stored[name] for name in self.patterns}))
        except INCONVERTIBLE as error:
            raise NotStreamableError(f"transformers cannot convert {self.key} back to {first}") from error
        shapes = {name: tensor.shape for name, tensor in after.items()}
        if shapes != {name: stored[name].shape if name in stored else shapes[name] for name in self.outputs}:
            raise NotStreamableError(f"transformers does not convert {self.key} back to {first}")

    def _run(self, converter, key: str) -> dict[str, Tensor]:
        made = converter.convert(key, model=self.model, config=getattr(self.model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def find_conversions(
    model: nn.Module, stored: dict[str, Tensor], dtype: torch.dtype, quantizer: object | None = None
) -> list[Conversion]:
    """The conversions by which `from_pretrained` makes `model` of a checkpoint.

    Args:
        model: on the meta device, with the dtypes that transformers gives its tensors.
        stored: all tensors on disk by name, on the meta device. The model does not take those that are in no
            conversion.
        dtype: of the model.
        quantizer: of transformers, which dequantises.
    Raises: `NotStreamableError` if tensors of the model are made twice, or have another shape;
        `QuantizedModelError` if one cannot be dequantised.
    """
    state = model.state_dict()
    found = _by_key(model, stored, renaming(model, state), state)
    if quantizer is not None:
        for key, made in _by_key(model, stored, renaming(model, state, quantizer), state).items():
            if key not in found or found[key].sources != made.sources:
                made.written = found.get(key) or Conversion(model, key, None, {key: None})
                found[key] = made
    kept = dtype_plan(model, dtype)
    for key, made in found.items():
        made.dtype = kept(key) or state[key].dtype
        _settle(made, stored, state)
        made.targets = _targets(made, stored, state)
        if made.written:
            made.written.dtype, made.written.targets = made.dtype, made.targets
    return list(found.values())


def dequantized_alone(
    names: Iterable[str], stored: dict[str, Tensor], quantizer: object, dtype: torch.dtype
) -> list[Conversion]:
    """The conversions of quantised weights that the model does not take: each to a tensor of its own."""
    from transformers.core_model_loading import rename_source_key

    converters, found = quantizer.get_weight_conversions(), {}
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    for name in in_merging_order(names):
        key, pattern = rename_source_key(name, [], converters)
        if pattern is not None:
            alone = Conversion(None, key, None, {key: None}, targets=[key], dtype=dtype)
            made = Conversion(None, key, by_pattern[pattern], targets=[key], dtype=dtype, written=alone)
            found.setdefault(key, made).patterns[name] = pattern
    quantized = [made for made in found.values() if len(made.patterns) > 1]
    for made in quantized:
        _on_meta(made, stored)
    return quantized


def _by_key(
    model: nn.Module, names: Iterable[str], rename: Callable[[str], tuple], state: dict[str, Tensor]
) -> dict[str, Conversion]:
    found: dict[str, Conversion] = {}
    for name in in_merging_order(names):
        renamed, key, converter, pattern = rename(name)
        if key not in state:
            continue
        made = found.setdefault(key, Conversion(model, key, converter))
        if made.patterns and None in (converter, made.converter):
            raise NotStreamableError(f"{next(iter(made.patterns))} and {name} are one weight, {key}")
        made.patterns[name] = pattern
        made.renamed[renamed] = name
    return found


def in_merging_order(names: Iterable[str]) -> list[str]:
    """Names on disk in the order in which transformers reads, and merges, tensors."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def renaming(
    model: nn.Module, state: dict[str, Tensor], quantizer: object | None = None
) -> Callable[[str], tuple]:
    """A function: name on disk -> (its name when the converter takes over, name in the model, the converter
    or None, its pattern)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    prefix = model.base_model_prefix
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    def rename(name: str) -> tuple[str, str, object | None, str | None]:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None:
            return key, key, None, None
        begin = rename_source_key(name, renamings, [])[0]
        converted = rename_source_key(name, renamings, converters)[0]
        return _with_prefix(begin, converted, key), key, by_pattern[pattern], pattern

    return rename


def _with_prefix(name: str, before: str, after: str) -> str:
    """`name` with the prefix added, or removed, that makes `after` of `before`."""
    if before.endswith(after):
        return name.removeprefix(before.removesuffix(after))
    return after.removesuffix(before) + name


def _settle(conversion: Conversion, stored: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Decide now about a transposition that depends on the shape on disk: the way back cannot."""
    operations = getattr(conversion.converter, "operations", ())
    if len(operations) == 1 and getattr(operations[0], "check_dims", False):
        same = stored[next(iter(conversion.patterns))].shape == state[conversion.key].shape
        conversion.converter = None if same else deepcopy(conversion.converter)
        if not same:
            conversion.converter.operations[0].check_dims = False


def _targets(conversion: Conversion, stored: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    first, targets = next(iter(conversion.patterns)), []
    for name, tensor in _on_meta(conversion, stored).items():
        needed = list(state[name].shape) if name in state else None
        if list(tensor.shape) != needed:
            raise NotStreamableError(f"{first} makes {name} {list(tensor.shape)}, the model has {needed}")
        targets.append(name)
    return targets


def _on_meta(conversion: Conversion, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return conversion.to_model({name: stored[name] for name in conversion.patterns})
    except INCONVERTIBLE as error:
        first = next(iter(conversion.patterns))
        if conversion.written:
            raise QuantizedModelError(f"{first} cannot be dequantised: {error}") from error
        raise NotStreamableError(f"transformers cannot convert {first}: {error}") from error


def dtype_plan(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """A function: name in the model -> the dtype that transformers keeps it in, whatever the model's."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    expression, patterns, _ = build_glob_alternation(list(plan))

    def kept(name: str) -> torch.dtype | None:
        match = expression.search(name) if plan else None
        return plan[patterns[match.lastgroup]] if match else None

    return kept
