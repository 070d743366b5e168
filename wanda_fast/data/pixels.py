"""From images to pixel values, by the model's own image processor, in threads."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

from wanda_fast.data.documents import reason
from wanda_fast.data.images import Images
from wanda_fast.errors import CalibrationError

# Images that may be undecodable: this many, or this share if it is more.
UNREADABLE, UNREADABLE_SHARE = 10, 0.01
# Images that a thread may be ahead.
AHEAD = 8
# Exceptions of Pillow, numpy and image processors for an image that cannot be decoded or resized.
BROKEN = (OSError, ValueError, TypeError, SyntaxError, IndexError, AttributeError, OverflowError)


class PixelReader:
    """Reads images as the model takes them. Undecodable images are skipped, and named.

    Args:
        processor: an image processor of transformers: `processor(images=[...], return_tensors="pt")`.
        warn: receives one sentence for each image that is skipped.
        threads: that decode and process images; 1 for a processor that draws random numbers.
    """

    def __init__(
        self, images: Images, processor: Callable, warn: Callable[[str], None], threads: int | None = None
    ):
        self.images, self.processor, self.warn = images, processor, warn
        self.threads = threads or os.cpu_count() or 1
        self.skipped = 0

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """(index, pixel values fp32 `[3, height, width]`) of each image that can be decoded, in order.

        Raises: `CalibrationError` if too many cannot, or if they are of several sizes.
        """
        indices, shape, self.skipped = list(indices), None, 0
        bound = max(UNREADABLE, int(UNREADABLE_SHARE * len(indices)))
        with ThreadPoolExecutor(self.threads, thread_name_prefix="wanda-fast-image") as pool:
            for index, pending in _ahead(pool, self._pixels, indices, self.threads * AHEAD):
                try:
                    pixels = pending.result()
                except BROKEN as error:
                    self._skip(index, error, bound)
                    continue
                shape = shape or pixels.shape
                if pixels.shape != shape:
                    raise CalibrationError(
                        f"{self.images.name(index)} has pixel values {list(pixels.shape)}, earlier images "
                        f"{list(shape)}: the model's image processor must give all images one size"
                    )
                yield index, pixels

    def _pixels(self, index: int) -> Tensor:
        image = self.images.load(index)
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0].float()

    def _skip(self, index: int, error: Exception, bound: int) -> None:
        self.skipped += 1
        sentence = f"{self.images.name(index)} cannot be decoded: {reason(error)}"
        if self.skipped > bound:
            raise CalibrationError(f"{self.skipped} images cannot be decoded, the last of them {sentence}")
        self.warn(f"skipped: {sentence}")


def read_all(
    reader: PixelReader, indices: Iterable[int], progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Pixel values fp32 `[n, 3, height, width]` of those images that can be decoded."""
    indices, pixels, count = list(indices), None, 0
    for _, each in reader.read(indices):
        if pixels is None:
            pixels = torch.empty(len(indices), *each.shape)
        pixels[count] = each
        count += 1
        if progress:
            progress(count, len(indices))
    if pixels is None:
        raise CalibrationError(f"none of the {len(indices)} images of {reader.images.label} can be decoded")
    return pixels[:count]


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Tensor], indices: list[int], most: int
) -> Iterator[tuple[int, Future]]:
    """Each index with its pending result; at most `most` are computed before they are wanted."""
    waiting = iter(indices)
    pending = [(index, pool.submit(work, index)) for index in islice(waiting, most)]
    while pending:
        yield pending.pop(0)
        pending += [(index, pool.submit(work, index)) for index in islice(waiting, 1)]
