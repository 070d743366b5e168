"""The image processor of a checkpoint, and what it does in words."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from wanda_fast.checkpoint.load import UNLOADABLE, first_line, locate
from wanda_fast.errors import CalibrationError


def load_image_processor(path: str, cache_dir: str | None = None) -> Callable:
    """Raise `CalibrationError` if a checkpoint has no image processor, or it cannot be loaded."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            locate(path)[0], cache_dir=cache_dir, trust_remote_code=False
        )
    except UNLOADABLE as error:
        raise CalibrationError(
            f"the image processor of {path} cannot be loaded: {first_line(error)}; add its "
            f"preprocessor_config.json, or pass pixel values [n, 3, height, width] in Python"
        ) from error


def timm_processor(model: nn.Module) -> Callable:
    """The image processor of a timm model in transformers' wrapper."""
    from transformers import TimmWrapperImageProcessor

    return TimmWrapperImageProcessor(
        pretrained_cfg=model.config.pretrained_cfg, architecture=model.config.architecture
    )


def in_words(processor: object) -> str:
    """The steps that decide an image's pixel values."""
    if timm := getattr(processor, "data_config", None):
        size, steps = "x".join(map(str, timm["input_size"][1:])), []
        steps += [f"resized to {size}", f"crop {timm['crop_pct']:g}", str(timm["interpolation"])]
        return ", ".join([*steps, _normalized(timm["mean"], timm["std"])])
    steps = []
    if getattr(processor, "do_resize", None):
        steps.append(f"resized to {_size(processor.size)}")
    if getattr(processor, "crop_pct", None):
        steps.append(f"crop {processor.crop_pct:g}")
    if getattr(processor, "do_center_crop", None):
        steps.append(f"centre crop {_size(processor.crop_size)}")
    if getattr(processor, "do_normalize", None):
        steps.append(_normalized(processor.image_mean, processor.image_std))
    return ", ".join(steps) or type(processor).__name__


def _normalized(mean: Iterable[float], std: Iterable[float]) -> str:
    mean, std = (" ".join(f"{value:.3g}" for value in each) for each in (mean, std))
    return f"mean {mean}, std {std}"


def _size(size: object) -> str:
    sides = size if isinstance(size, Mapping) else getattr(size, "__dict__", {"": size})
    sides = {name: value for name, value in sides.items() if value is not None}
    if set(sides) == {"height", "width"}:
        return f"{sides['height']}x{sides['width']}"
    return ", ".join(f"{name.replace('_', ' ')} {value}".strip() for name, value in sides.items())
