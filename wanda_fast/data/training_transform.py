"""timm's transform for training, through which the published code reads its calibration images."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wanda_fast.errors import MissingDependencyError

# The published code's defaults, those of ConvNeXt's training.
PUBLISHED = {
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "interpolation": "bicubic",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "re_count": 1,
}


class TrainingTransform:
    """Random crop, flip, RandAugment and erasing; then mean and std. Called as an image processor is.

    It draws from the global generators of Python, numpy and torch, so it serves one thread (`drawn_from`).

    Args:
        processor: the model's image processor, whose size, mean and std are taken.
    Raises: `MissingDependencyError` without timm or torchvision.
    Source: the published Wanda's `image_classifiers/datasets.py`.
    """

    def __init__(self, processor: Callable):
        from PIL import Image

        try:
            from timm.data import create_transform
        # torchvision raises a RuntimeError if it was built for another torch.
        except (ImportError, RuntimeError) as error:
            raise MissingDependencyError(
                "image_transform train needs timm, and the torchvision of this torch: pip install timm"
            ) from error
        size = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"].shape
        of_timm = getattr(processor, "data_config", None)
        mean, std = (
            of_timm[name] if of_timm else getattr(processor, f"image_{name}") for name in ("mean", "std")
        )
        self.transform = create_transform(tuple(size[-3:]), is_training=True, mean=mean, std=std, **PUBLISHED)

    def __call__(self, images: list, return_tensors: str = "pt") -> dict[str, list[Tensor]]:
        from PIL import Image

        pictures = (image if hasattr(image, "mode") else Image.fromarray(image) for image in images)
        return {"pixel_values": [self.transform(picture) for picture in pictures]}


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Context in which the global generators begin at `seed`; their states are put back at its end."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            numpy.random.seed(seed)
            torch.random.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
