"""Top-1 and top-5 accuracy of an image classifier."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from wanda_fast.data.images import Images
from wanda_fast.data.pixels import PixelReader
from wanda_fast.errors import CalibrationError
from wanda_fast.model.block_forward import faster_forward
from wanda_kernels.forward import reused_memory

IMAGES_PER_FORWARD = 32


@dataclass
class LabelledImages:
    """The images that accuracy is measured on. They are decoded anew in each evaluation.

    Attributes:
        indices: which of the reader's images.
        labels: the number of each one's class.
        transform: the processor's steps in words.
    """

    reader: PixelReader
    indices: list[int]
    labels: dict[int, int]
    transform: str

    @property
    def protocol(self) -> str:
        """The data in words, for the report."""
        return f"{self.reader.images.label}, {len(self.indices)} images, {self.transform}"

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixel values, classes int64) of IMAGES_PER_FORWARD images at a time."""
        pairs = self.reader.read(self.indices)
        while batch := list(islice(pairs, IMAGES_PER_FORWARD)):
            yield (
                torch.stack([pixels for _, pixels in batch]),
                torch.tensor([self.labels[i] for i, _ in batch]),
            )


def labelled(reader: PixelReader, model: nn.Module, most: int | None, transform: str) -> LabelledImages:
    """The images of a reader with the numbers of their classes.

    Args:
        most: at most this many images, spread evenly.
    Raises: `CalibrationError` if the images have no classes, or others than the model.
    """
    images = reader.images
    if images.classes is None:
        raise CalibrationError(
            f"{images.label} has no classes, so accuracy cannot be measured: an evaluation needs a folder of "
            f"class folders, or a dataset with a label column"
        )
    numbers = class_numbers(images, getattr(model, "config", None))
    count = min(images.count, most or images.count)
    indices = [index * images.count // count for index in range(count)]
    return LabelledImages(reader, indices, {i: numbers[images.classes[i]] for i in indices}, transform)


def class_numbers(images: Images, config: object) -> dict[str | int, int]:
    """Class in the data -> its number in the model: by `label2id`, or in alphabetical order.

    Raises: `CalibrationError` if neither can be.
    """
    found = sorted(set(images.classes))
    outputs = getattr(config, "num_labels", None)
    if isinstance(found[0], int):
        if outputs is not None and (found[0] < 0 or found[-1] >= outputs):
            raise CalibrationError(f"{images.label} has class {found[-1]}, the model has {outputs} classes")
        return {number: number for number in found}
    known = getattr(config, "label2id", None) or {}
    if all(name in known for name in found):
        return {name: int(known[name]) for name in found}
    if outputs is not None and len(found) != outputs:
        raise CalibrationError(
            f"{images.label} has {len(found)} class folders, e.g. {found[0]}, which the model's label2id "
            f"does not name, and the model has {outputs} classes: their numbers are unknown"
        )
    return {name: number for number, name in enumerate(found)}


@torch.no_grad()
def accuracy(
    model: nn.Module, images: LabelledImages, progress: Callable[[int], object] | None = None
) -> dict[str, float]:
    """{"top1": share of images whose class has the highest logit, "top5": one of the five highest}."""
    parameter = next(model.parameters())
    seen, right = 0, {1: 0, 5: 0}
    for pixels, labels in images.batches():
        with faster_forward(parameter.device), reused_memory():
            output = model(pixels.to(parameter.device, parameter.dtype))
        logits = getattr(output, "logits", output).float().cpu()
        order = logits.topk(min(5, logits.shape[1]), dim=1).indices
        for most in right:
            right[most] += int((order[:, :most] == labels[:, None]).sum())
        for done in range(seen + 1, seen + len(labels) + 1):
            if progress:
                progress(done)
        seen += len(labels)
    if not seen:
        raise CalibrationError(f"none of the images of {images.reader.images.label} can be decoded")
    return {f"top{most}": count / seen for most, count in right.items()}
