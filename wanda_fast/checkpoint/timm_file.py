"""A timm model by its name, with the weights of a file, as the published image classifiers are loaded."""

import importlib.util
import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wanda_fast.checkpoint.load import UNLOADABLE, Checkpoint, first_line
from wanda_fast.errors import CheckpointError, MissingDependencyError

# Where the published checkpoints of DeiT and ConvNeXt have their weights.
KEYS = ("model", "state_dict")


def load_timm(name: str, file: str) -> Checkpoint:
    """timm's model `name` in transformers' wrapper, with the weights of a .safetensors, .pth or .pt file.

    Raises: `MissingDependencyError` without timm; `CheckpointError` if there is no such model or file, or one
        does not fit the other.
    """
    if importlib.util.find_spec("timm") is None:
        raise MissingDependencyError(
            f"checkpoint {file} is for a model of timm, which is not installed: pip install timm"
        )
    state = _read(Path(file))
    try:
        model = _new_model(name, state)
        module = sys.modules[type(model.timm_model).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None)
        state = convert(state, model.timm_model) if convert else state
        found = model.timm_model.load_state_dict(state, strict=False)
    except UNLOADABLE as error:
        raise CheckpointError(f"checkpoint {file} does not fit timm's {name}: {first_line(error)}") from error
    if wrong := [*found.missing_keys, *found.unexpected_keys]:
        raise CheckpointError(
            f"checkpoint {file} does not fit timm's {name}: it lacks {len(found.missing_keys)} of the "
            f"model's tensors and has {len(found.unexpected_keys)} others, e.g. {wrong[0]}"
        )
    return Checkpoint(model.eval(), None, next(model.parameters()).dtype)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"checkpoint {file} does not exist")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Tensors alone: a pickle of anything else could run code.
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (*UNLOADABLE, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {file} cannot be read: {first_line(error)}") from error
    return next((content[key] for key in KEYS if key in content), content)


def _new_model(name: str, state: dict[str, Tensor]) -> nn.Module:
    """The model with initial weights, and as many classes as the file's head has rows."""
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    about = timm.get_pretrained_cfg(name, allow_unregistered=False).to_dict()
    head = about.get("classifier") or ""
    head = head if isinstance(head, str) else head[0]
    weight = state.get(f"{head}.weight")
    classes = about["num_classes"] if weight is None else len(weight)
    config = TimmWrapperConfig(architecture=name, num_labels=classes, pretrained_cfg=about)
    return TimmWrapperForImageClassification(config)
