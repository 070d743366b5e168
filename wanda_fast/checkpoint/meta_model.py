"""Opens a checkpoint without its weights: a model on the meta device, and the file of each of its tensors."""

from dataclasses import dataclass

import torch
from torch import nn

from wanda_fast.checkpoint.load import (
    DTYPES,
    UNLOADABLE,
    computed_in_float32,
    first_line,
    load_tokenizer,
    locate,
    require_dtype,
    safetensors_of,
)
from wanda_fast.checkpoint.model_class import new_model
from wanda_fast.checkpoint.own_dtypes import update_dtype
from wanda_fast.checkpoint.refusals import refuse_folder, refuse_quantized, refuse_unused
from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.errors import CheckpointError, NotStreamableError
from wanda_fast.model.architecture import require_untied_blocks


@dataclass
class MetaModel:
    """A checkpoint whose weights have not been read.

    Attributes:
        model: on the meta device, except for its non-persistent buffers, which are computed. `model.dtype` is
            the dtype of the computation.
        tokenizer: None if the checkpoint has none.
        dtype: that the tensors are read in, which is the checkpoint's main one unless `requested` is given.
        requested: the dtype that the caller named for the output; None: each tensor keeps its own.
        files: where the tensors are.
        names: tensor name on disk -> its names in the model; several if weights are tied.
    """

    model: nn.Module
    tokenizer: object
    dtype: torch.dtype
    files: TensorFiles
    names: dict[str, list[str]]
    requested: torch.dtype | None = None

    def update_dtypes(self, weights: list[str]) -> dict[str, torch.dtype]:
        """By name of each weight, the dtype to which it is rounded when it is updated."""
        own = {name: tensor.dtype for name, tensor in self.files.on_meta(weights).items()}
        return {name: self.requested or update_dtype(dtype, self.dtype) for name, dtype in own.items()}

    @property
    def unused(self) -> list[str]:
        """Tensors on disk that the model does not take. They are copied to the output unchanged."""
        taken = {alias for aliases in self.names.values() for alias in aliases}
        return [name for name in self.files.location if name not in taken]


def open_meta_model(
    path: str, dtype: str = "auto", cache_dir: str | None = None, device: str = "cpu"
) -> MetaModel:
    """The counterpart of `checkpoint.load.load` that reads no weights. The arguments are the same.

    Raises: `NotStreamableError` with the reason why the checkpoint must be loaded as a whole;
        `CheckpointError` if it is not a model.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder, gguf = locate(path)
    require_dtype(dtype)
    refuse_folder(path, folder, gguf, cache_dir)
    if gguf:
        raise NotStreamableError("GGUF files are read whole")
    files = TensorFiles.of(safetensors_of(folder, cache_dir))
    refuse_quantized(path, files)
    try:
        config = AutoConfig.from_pretrained(folder, cache_dir=cache_dir, trust_remote_code=False)
        stored = DTYPES.get(dtype) or config.dtype or _first_dtype(files)
        model = _without_weights(path, config, stored)
    except CheckpointError:
        raise
    except UNLOADABLE as error:
        raise NotStreamableError(first_line(error)) from error
    _refuse_conversions(model, files, stored)
    names = _names_on_disk(model, files)
    taken = {alias for aliases in names.values() for alias in aliases}
    refuse_unused(path, files.location.keys() - taken)
    require_untied_blocks(model, names.values())
    if computed_in_float32(stored, dtype, device):
        model.float()
    tokenizer = load_tokenizer(folder, cache_dir=cache_dir)
    return MetaModel(model.eval(), tokenizer, stored, files, names, DTYPES.get(dtype))


def _without_weights(path: str, config, dtype: torch.dtype) -> nn.Module:
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


def _refuse_conversions(model: nn.Module, files: TensorFiles, dtype: torch.dtype) -> None:
    """Raise `NotStreamableError` if transformers renames, merges or widens tensors as it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        for name in files.location:
            if conversion.rename_source_key(name) != (name, None):
                raise NotStreamableError(f"transformers converts {name} as it loads")
    if model._get_dtype_plan(dtype):
        raise NotStreamableError(f"some of its weights are not kept in {dtype}")


def _names_on_disk(model: nn.Module, files: TensorFiles) -> dict[str, list[str]]:
    """Tensor name on disk -> its names in the model.

    Raises: `NotStreamableError` if a tensor is missing or has another dtype or shape than the model needs, or
        tied weights differ in the file.
    """
    tied: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    if unknown := files.unknown_dtypes():
        raise NotStreamableError(f"its tensors are {', '.join(unknown)}")
    stored, names = files.on_meta(files.location), {}
    for aliases in tied.values():
        held = [alias for alias in aliases if alias in stored]
        if not held:
            raise NotStreamableError(f"{aliases[0]} is under another name, or absent")
        if stored[held[0]].shape != state[held[0]].shape:
            raise NotStreamableError(f"{held[0]} has shape {list(stored[held[0]].shape)} in the file")
        for other in held[1:]:
            same = files.read([held[0], other])
            if not torch.equal(same[held[0]], same[other]):
                raise NotStreamableError(f"{held[0]} and {other}, which are one weight, differ in the file")
        if len(held) > 1 and not _is_embedding(model, aliases):
            raise NotStreamableError(f"{held[0]} and {held[1]} are one weight under two names")
        names[held[0]] = aliases
    return names


def _is_embedding(model: nn.Module, names: list[str]) -> bool:
    """Whether one of these names is an embedding's, which no pruning changes."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    return any(isinstance(owner, nn.Embedding) for owner in owners)


def _first_dtype(files: TensorFiles) -> torch.dtype:
    return files.read([next(iter(files.location))]).popitem()[1].dtype
