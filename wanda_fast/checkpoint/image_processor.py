"""The image processor of a checkpoint, and what it does in words."""

from collections.abc import Callable, Mapping

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


def in_words(processor: object) -> str:
    """The steps that decide an image's pixel values."""
    steps = []
    if getattr(processor, "do_resize", None):
        steps.append(f"resized to {_size(processor.size)}")
    if getattr(processor, "crop_pct", None):
        steps.append(f"crop {processor.crop_pct:g}")
    if getattr(processor, "do_center_crop", None):
        steps.append(f"centre crop {_size(processor.crop_size)}")
    if getattr(processor, "do_normalize", None):
        mean, std = (
            " ".join(f"{value:.3g}" for value in each) for each in (processor.image_mean, processor.image_std)
        )
        steps.append(f"mean {mean}, std {std}")
    return ", ".join(steps) or type(processor).__name__


def _size(size: object) -> str:
    sides = size if isinstance(size, Mapping) else getattr(size, "__dict__", {"": size})
    sides = {name: value for name, value in sides.items() if value is not None}
    if set(sides) == {"height", "width"}:
        return f"{sides['height']}x{sides['width']}"
    return ", ".join(f"{name.replace('_', ' ')} {value}".strip() for name, value in sides.items())
