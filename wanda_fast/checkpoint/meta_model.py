"""Opens a checkpoint without its weights: a model on the meta device, and the file of each of its tensors."""

from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint.conversions import Conversion, dequantized_alone, find_conversions
from wanda_fast.checkpoint.dequantize import dequantizing, forget_quantization
from wanda_fast.checkpoint.load import (
    DTYPES,
    UNLOADABLE,
    computed_in_float32,
    first_line,
    load_tokenizer,
    locate,
    require_dtype,
    tensor_files,
)
from wanda_fast.checkpoint.model_class import new_model
from wanda_fast.checkpoint.own_dtypes import update_dtype
from wanda_fast.checkpoint.refusals import refuse_folder, refuse_quantized, refuse_unused
from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.errors import CheckpointError, NotStreamableError, QuantizedModelError
from wanda_fast.model.architecture import find_blocks, require_untied_blocks
from wanda_fast.model.block_lists import classifies_images


@dataclass
class MetaModel:
    """A checkpoint whose weights have not been read.

    Attributes:
        model: on the meta device, except for its non-persistent buffers, which are computed. `model.dtype` is
            the dtype of the computation.
        tokenizer: None if the checkpoint has none.
        dtype: that most tensors are read in, which is the checkpoint's main one unless `requested` is given.
        requested: the dtype that the caller named for the output; None: each tensor keeps its own.
        files: where the tensors are.
        conversions: that make the model of the tensors on disk.
        aliases: name in the model, as in a conversion's targets -> all names of the same tensor there.
        unused: tensors on disk that the model does not take. They are copied to the output unchanged.
        unused_quantized: those that are dequantised first.
    """

    model: nn.Module
    tokenizer: object
    dtype: torch.dtype
    files: TensorFiles
    conversions: list[Conversion]
    aliases: dict[str, list[str]]
    unused: list[str]
    unused_quantized: list[Conversion] = field(default_factory=list)
    requested: torch.dtype | None = None

    def __post_init__(self):
        self.conversion = {name: made for made in self.conversions for name in made.sources}
        # By name in the output.
        self.written = {name: made.written or made for made in self.conversions for name in made.outputs}
        # Name on disk -> the names in the model of all that the tensor becomes a part of.
        self.names = {
            name: [alias for target in self.conversion[name].targets for alias in self.aliases[target]]
            for name in self.files.location
            if name in self.conversion
        }

    @property
    def converted(self) -> frozenset[str]:
        """Names of the model's tensors that are not on disk as they are."""
        return frozenset(name for made in self.conversions if made.converter for name in made.targets)

    def update_dtypes(self, weights: list[str]) -> dict[str, torch.dtype]:
        """By name of each weight in the model, the dtype to which it is rounded when it is updated."""
        own = self.files.on_meta(self.conversion)
        made = {alias: c for c in self.conversions for target in c.targets for alias in self.aliases[target]}
        return {name: self.requested or self._update_dtype(made[name], own) for name in weights}

    def _update_dtype(self, conversion: Conversion, own: dict[str, Tensor]) -> torch.dtype:
        if conversion.written:
            return conversion.dtype
        dtypes = [own[name].dtype for name in conversion.sources]
        return reduce(lambda narrowest, each: update_dtype(each, narrowest), dtypes, conversion.dtype)


def open_meta_model(
    path: str,
    dtype: str = "auto",
    cache_dir: str | None = None,
    device: str = "cpu",
    dequantize: bool = False,
    with_tokenizer: bool = True,
) -> MetaModel:
    """The counterpart of `checkpoint.load.load` that reads no weights. The arguments are the same, but for
    `with_tokenizer`: whether it is needed.

    Raises: `NotStreamableError` with the reason why the checkpoint must be loaded as a whole;
        `CheckpointError` if it is not a model; `QuantizedModelError`.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder, gguf = locate(path)
    require_dtype(dtype)
    quantized = refuse_folder(path, folder, gguf, cache_dir, dequantize)
    if gguf:
        raise NotStreamableError("GGUF files are read whole")
    files = tensor_files(folder, cache_dir)
    try:
        config = AutoConfig.from_pretrained(folder, cache_dir=cache_dir, trust_remote_code=False)
        quantizer = dequantizing(path, config) if quantized else None
        if quantizer is None:
            refuse_quantized(path, files)
        forget_quantization(config)
        stored = DTYPES.get(dtype) or config.dtype or _first_dtype(files)
        model = without_weights(path, config, stored)
    except (CheckpointError, QuantizedModelError):
        raise
    except UNLOADABLE as error:
        raise NotStreamableError(first_line(error)) from error
    if unknown := files.unknown_dtypes():
        raise NotStreamableError(f"its tensors are {', '.join(unknown)}")
    made = _conversions(model, files, stored, quantizer)
    opened = MetaModel(model.eval(), None, stored, files, *made, DTYPES.get(dtype))
    if quantizer is None:
        refuse_unused(path, opened.unused)
    require_untied_blocks(model, opened.names.values())
    _require_inverses(opened)
    if computed_in_float32(stored, dtype, device):
        model.float()
    if with_tokenizer and not classifies_images(model):
        opened.tokenizer = load_tokenizer(folder, cache_dir=cache_dir)
    return opened


def _conversions(
    model: nn.Module, files: TensorFiles, dtype: torch.dtype, quantizer: object | None
) -> tuple[list[Conversion], dict[str, list[str]], list[str], list[Conversion]]:
    """The conversions, aliases and unused tensors of a `MetaModel`. The model's tensors get their dtypes.

    Raises: `NotStreamableError`.
    """
    stored, state = files.on_meta(files.location), model.state_dict(keep_vars=True)
    found = find_conversions(model, stored, dtype, quantizer)
    taken = {name for conversion in found for name in conversion.sources}
    aliases = _aliases(model, state, found, files)
    needed = [conversion for conversion in found if not aliases.keys().isdisjoint(conversion.targets)]
    for conversion in needed:
        for tensor in (state[name] for name in conversion.targets):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(conversion.dtype)
    unused = [name for name in stored if name not in taken]
    alone = dequantized_alone(unused, stored, quantizer, dtype) if quantizer else []
    taken |= {name for conversion in alone for name in conversion.sources}
    return needed, aliases, [name for name in unused if name not in taken], alone


def _require_inverses(opened: MetaModel) -> None:
    """Raise `NotStreamableError` if a weight that may be pruned cannot be converted back."""
    weights = {linear.parameter for block in find_blocks(opened.model) for linear in block.linears}
    stored = opened.files.on_meta(opened.conversion)
    for conversion in opened.conversions:
        if conversion.written or not weights.isdisjoint(conversion.targets):
            conversion.require_inverse(stored)


def without_weights(path: str, config, dtype: torch.dtype) -> nn.Module:
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = new_model(path, config, dtype)
    # Parameters on the meta device need no initial values. Buffers do: `from_config` has computed them in
    # `dtype`, but `from_pretrained` computes them in float32.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.init_weights()
    return model


def _aliases(
    model: nn.Module, state: dict[str, Tensor], conversions: list[Conversion], files: TensorFiles
) -> dict[str, list[str]]:
    """For each tensor of the model, the one of its names that a conversion makes -> all of its names.

    Raises: `NotStreamableError` if no conversion makes a tensor, or tied weights differ in the file.
    """
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    made, found = {name: each for each in conversions for name in each.targets}, {}
    for names in tied.values():
        held = [name for name in names if name in made]
        if not held:
            raise NotStreamableError(f"{names[0]} is absent")
        for other in held[1:]:
            _require_same(made[held[0]], made[other], files)
        if len(held) > 1 and not _is_embedding(model, names):
            raise NotStreamableError(f"{held[0]} and {held[1]} are one weight under two names")
        found[held[0]] = names
    return found


def _require_same(one: Conversion, other: Conversion, files: TensorFiles) -> None:
    """Raise `NotStreamableError` unless two names of one weight have the same values in the file."""
    first, second = one.sources[0], other.sources[0]
    stored = files.read([first, second])
    if one.converter or other.converter or not torch.equal(stored[first], stored[second]):
        raise NotStreamableError(f"{first} and {second}, which are one weight, differ in the file")


def _is_embedding(model: nn.Module, names: list[str]) -> bool:
    """Whether one of these names is an embedding's, which no pruning changes."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    return any(isinstance(owner, nn.Embedding) for owner in owners)


def _first_dtype(files: TensorFiles) -> torch.dtype:
    dtype = files.read([next(iter(files.location))]).popitem()[1].dtype
    return dtype if dtype.itemsize > 1 else torch.bfloat16
