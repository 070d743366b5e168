"""Images by name: a folder, a dataset of the hub, scikit-learn's digits, a `Dataset`, or a tensor."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wanda_fast.data.documents import reason
from wanda_fast.data.text import named
from wanda_fast.errors import CalibrationError, MissingDependencyError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# Folders in a dataset's folder, and splits on the hub, by what they are for; the first one found is read.
SPLITS = {"calibration": ("train",), "evaluation": ("validation", "val", "test")}
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")
# Of the digits, every fifth image is for the evaluation.
DIGITS_PARTS = 5


@dataclass
class Images:
    """Images that are decoded one at a time.

    Attributes:
        label: their name in reports and messages.
        count: how many they are.
        load: image `index`, as `PIL.Image` or as an array `[height, width, 3]`.
        name: of image `index`, in messages.
        classes: name of each image's class, or its number; None: unknown.
    """

    label: str
    count: int
    load: Callable[[int], object]
    name: Callable[[int], str]
    classes: list[str] | list[int] | None = None


def find_images(dataset: object, purpose: str, cache_dir: str | None = None) -> Images | Tensor:
    """The images that `dataset` names.

    Args:
        dataset: "digits"; a folder of class folders or of images, or of the folders `train` and `val` with
            either; a dataset of the hub; a `datasets.Dataset`; or pixel values, floating-point
            `[n, 3, height, width]`, which are returned as a tensor.
        purpose: "calibration" or "evaluation": which split is read.
        cache_dir: for downloads from the hub.
    Raises: `CalibrationError`, `MissingDependencyError`.
    """
    if not isinstance(dataset, (str, Path)):
        return _given(dataset)
    if dataset == "digits":
        return _digits(purpose)
    path = Path(dataset).expanduser()
    if path.is_dir():
        split = next((path / name for name in SPLITS[purpose] if (path / name).is_dir()), path)
        return _of_folder(split)
    if path.exists():
        raise CalibrationError(
            f"dataset {dataset} is a file: an image classifier takes a folder of images, or of class folders"
        )
    return _of_hub(str(dataset), purpose, cache_dir)


def holds_images(dataset: str) -> bool:
    """Whether it is a local folder with an image in it."""
    path = Path(dataset).expanduser()
    return path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.rglob("*"))


def has_evaluation(folder: str) -> bool:
    """Whether a folder of images has one for the evaluation beside others."""
    return any((Path(folder).expanduser() / name).is_dir() for name in SPLITS["evaluation"])


def open_image(file: Path) -> object:
    """A file's image in RGB, 8 bits a channel. Wider channels lose their lowest bits; alpha is dropped."""
    from PIL import Image

    with Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: object) -> object:
    """A `PIL.Image` of any mode in RGB."""
    if image.mode.startswith("I"):
        import numpy
        from PIL import Image

        # PIL would clip 16 bits at 255.
        image = Image.fromarray((numpy.asarray(image) >> 8).astype("uint8"))
    return image.convert("RGB")


def require_pillow() -> None:
    """Raise `MissingDependencyError` unless images can be decoded and resized."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "images need pillow, which is not installed: pip install 'wanda_fast[vision]'"
        ) from error


def _given(data: object) -> Images | Tensor:
    if isinstance(names := getattr(data, "column_names", None), list):
        return _of_table(data, names, "dataset")
    if hasattr(data, "__array__") and not isinstance(data, Tensor):
        import numpy

        data = torch.from_numpy(numpy.asarray(data).copy())
    if not isinstance(data, Tensor):
        raise CalibrationError(
            f"dataset is of type {type(data).__name__}: an image classifier takes the path of a folder, a "
            f"datasets.Dataset, or pixel values [n, 3, height, width]"
        )
    if data.dim() != 4 or not data.is_floating_point() or not data.numel():
        raise CalibrationError(
            f"images must be floating-point pixel values [n, channels, height, width], as the model takes "
            f"them, got {data.dtype} {list(data.shape)}"
        )
    return data


def _of_folder(folder: Path) -> Images:
    require_pillow()
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not _is_hidden(file.relative_to(folder))
    )
    if not files:
        raise CalibrationError(f"dataset folder {folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    nested = [len(file.relative_to(folder).parts) > 1 for file in files]
    if any(nested) and not all(nested):
        raise CalibrationError(
            f"dataset folder {folder} holds {sum(nested)} images in class folders and "
            f"{len(nested) - sum(nested)} beside them, e.g. {files[nested.index(False)].name}"
        )
    classes = [file.relative_to(folder).parts[0] for file in files] if all(nested) else None
    return Images(str(folder), len(files), lambda i: open_image(files[i]), lambda i: str(files[i]), classes)


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _digits(purpose: str) -> Images:
    """scikit-learn's 1,797 digits of 8x8 pixels, in three equal channels."""
    require_pillow()
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "dataset digits needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    in_test = [index % DIGITS_PARTS == DIGITS_PARTS - 1 for index in range(len(pixels))]
    own = [index for index, test in enumerate(in_test) if test == (purpose == "evaluation")]
    part = "every fifth" if purpose == "evaluation" else "four fifths"
    return Images(
        f"digits, {part}",
        len(own),
        lambda i: pixels[own[i]][..., None].repeat(3, axis=2),
        lambda i: f"digit {own[i]}",
        [int(digits.target[index]) for index in own],
    )


def _of_hub(dataset: str, purpose: str, cache_dir: str | None) -> Images:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"dataset {named(dataset)} is no folder; the hub's datasets need the package datasets, which is "
            f"not installed: pip install datasets"
        ) from error
    try:
        splits = datasets.get_dataset_split_names(dataset)
        split = next((name for name in SPLITS[purpose] if name in splits), splits[0])
        table = datasets.load_dataset(dataset, split=split, cache_dir=cache_dir)
    # Offline, not in the cache, or removed from the hub: the remedy is the same.
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise CalibrationError(
            f"dataset {named(dataset)} is neither digits nor an existing folder, and is no dataset of the "
            f"hub that could be loaded: {reason(error)}"
        ) from error
    return _of_table(table, table.column_names, f"{dataset}, {split}")


def _of_table(table: object, names: list[str], label: str) -> Images:
    """Images in the rows of a `datasets.Dataset`."""
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise CalibrationError(
            f"{label} holds no images: its columns are {', '.join(names[:8])}, none of "
            f"{', '.join(IMAGE_COLUMNS)}"
        )
    if not len(table):
        raise CalibrationError(f"{label} holds no rows")
    require_pillow()
    column = next((name for name in LABEL_COLUMNS if name in names), None)
    classes = None if column is None else list(table[column])
    return Images(label, len(table), lambda i: _decoded(table[i][image]), lambda i: f"row {i}", classes)


def _decoded(image: object) -> object:
    return to_rgb(image) if hasattr(image, "mode") else image


def as_indices(images: Images, nsamples: int, seed: int) -> Iterable[int]:
    """Which images are drawn: as the published code draws them, or all of them if they are no more.

    Source: the published Wanda's `image_classifiers/main.py`: `np.random.seed(seed)`, then
        `np.random.choice(count, nsamples)`, with replacement.
    """
    import numpy

    if images.count <= nsamples:
        return range(images.count)
    return numpy.random.RandomState(seed).choice(images.count, nsamples).tolist()
