"""Images: which are found and drawn, how they are decoded, what is refused, and the accuracy on them."""

import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from wanda_fast.data.accuracy import accuracy, class_numbers, labelled
from wanda_fast.data.images import Images, as_indices, find_images, has_evaluation, holds_images
from wanda_fast.data.pixels import UNREADABLE, PixelReader, read_all
from wanda_fast.errors import CalibrationError, MissingDependencyError


def halves(images, return_tensors):
    """An image processor: the pixels as they are, channels first, in units of 2."""
    return {"pixel_values": torch.stack([torch.tensor(numpy.asarray(x) / 2).movedim(2, 0) for x in images])}


def numbered(count, broken=(), sides=None, classes=None):
    """`count` images, each of one value: its number."""

    def load(index):
        if index in broken:
            raise OSError("image file is truncated")
        side = (sides or {}).get(index, 2)
        return numpy.full((side, side, 3), index)

    return Images("numbers", count, load, lambda index: f"image {index}", classes)


def test_draws_are_those_of_the_published_code():
    numpy.random.seed(5)
    published = numpy.random.choice(40, 12)
    assert list(as_indices(numbered(40), 12, seed=5)) == published.tolist()
    assert list(as_indices(numbered(12), 12, seed=5)) == list(range(12))


def test_pixels_come_in_order_through_the_processor():
    drawn = [7, 3, 3, 19] + list(range(100))
    steps = []
    pixels = read_all(
        PixelReader(numbered(100), halves, pytest.fail),
        drawn,
        lambda done, total: steps.append((done, total)),
    )
    assert pixels.dtype == torch.float32 and pixels.shape == (104, 3, 2, 2)
    assert torch.equal(pixels, (torch.tensor(drawn) / 2).view(-1, 1, 1, 1).expand_as(pixels))
    assert steps == [(done, 104) for done in range(1, 105)]


def test_undecodable_images_are_named_and_skipped():
    said = []
    pixels = read_all(PixelReader(numbered(5, broken=(1, 4)), halves, said.append), range(5))
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 1.5]
    assert said == [f"skipped: image {i} cannot be decoded: image file is truncated" for i in (1, 4)]


def test_many_undecodable_images_are_refused():
    few, many = range(UNREADABLE), range(UNREADABLE + 1)
    assert len(read_all(PixelReader(numbered(50, few), halves, str), range(50))) == 40
    with pytest.raises(CalibrationError, match="11 images cannot be decoded, the last of them image 10 "):
        read_all(PixelReader(numbered(50, many), halves, str), range(50))
    with pytest.raises(CalibrationError, match="none of the 3 images of numbers can be decoded"):
        read_all(PixelReader(numbered(3, few), halves, str), range(3))


def test_images_of_two_sizes_are_refused():
    reader = PixelReader(numbered(4, sides={2: 3}), halves, pytest.fail)
    with pytest.raises(
        CalibrationError, match=r"image 2 has pixel values \[3, 3, 3\], earlier images \[3, 2, 2\]"
    ):
        read_all(reader, range(4))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), r"got torch.int64 \[2, 3, 4, 4\]"),
        (torch.zeros(3, 4, 4), r"got torch.float32 \[3, 4, 4\]"),
        (torch.zeros(0, 3, 4, 4), r"got torch.float32 \[0, 3, 4, 4\]"),
        (["a picture"], "dataset is of type list"),
        (SimpleNamespace(column_names=["text", "label"]), "its columns are text, label, none of image"),
    ],
)
def test_what_is_no_image_is_refused(given, words):
    with pytest.raises(CalibrationError, match=words):
        find_images(given, "calibration")


def test_pixel_values_are_used_unchanged():
    pixels = torch.randn(2, 3, 4, 4)
    assert find_images(pixels, "calibration") is pixels
    assert torch.equal(find_images(pixels.numpy(), "calibration"), pixels)


@pytest.fixture
def folder(tmp_path):
    """train/b, train/a, val/a: images of one colour each, in several modes."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    wide = numpy.full((3, 3), 0xABCD, dtype=numpy.uint16)
    of_modes = {"L": 40, "RGBA": (1, 2, 3, 9), "CMYK": (0, 0, 0, 0), "P": 0}
    files = {"train/b/wide.png": image.fromarray(wide)}
    files |= {f"train/a/{mode}.tif": image.new(mode, (3, 3), of_modes[mode]) for mode in of_modes}
    files["val/a/1.PNG"] = image.new("RGB", (3, 3))
    for name, picture in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_class_folders(folder):
    found = find_images(str(folder), "calibration")
    assert (found.label, found.count) == (str(folder / "train"), 5)
    assert found.classes == ["a"] * 4 + ["b"]
    colours = {
        found.name(i).rpartition("/")[2]: numpy.asarray(found.load(i))[2, 2].tolist() for i in range(5)
    }
    assert colours == {
        "CMYK.tif": [255, 255, 255],
        "L.tif": [40, 40, 40],
        "P.tif": colours["P.tif"],
        "RGBA.tif": [1, 2, 3],
        "wide.png": [0xAB, 0xAB, 0xAB],
    }
    assert find_images(folder, "evaluation").label == str(folder / "val")
    assert find_images(folder / "train", "evaluation").count == 5
    assert holds_images(str(folder)) and has_evaluation(str(folder))
    assert not has_evaluation(str(folder / "train"))


def test_folders_that_are_refused(folder, tmp_path):
    assert find_images(folder / "val/a", "calibration").classes is None
    (folder / "val/stray.png").write_bytes((folder / "val/a/1.PNG").read_bytes())
    with pytest.raises(CalibrationError, match="1 images in class folders and 1 beside them, e.g. stray.png"):
        find_images(folder / "val", "calibration")
    (folder / "empty").mkdir()
    with pytest.raises(CalibrationError, match="empty holds no image"):
        find_images(folder / "empty", "calibration")
    with pytest.raises(CalibrationError, match="1.PNG is a file"):
        find_images(folder / "val/a/1.PNG", "calibration")


class Table:
    """What is used of a `datasets.Dataset`."""

    column_names = ["img", "label"]

    def __len__(self):
        return 3

    def __getitem__(self, key):
        return [2, 0, 1] if key == "label" else {"img": numpy.full((2, 2, 3), 10 * key)}


def test_rows_of_a_dataset():
    pytest.importorskip("PIL", reason="needs pillow")
    found = find_images(Table(), "calibration")
    assert (found.count, found.classes, found.name(1)) == (3, [2, 0, 1], "row 1")
    assert read_all(PixelReader(found, halves, pytest.fail), range(3))[:, 0, 0, 0].tolist() == [0, 5, 10]


@pytest.mark.parametrize(
    ("module", "words"), [("PIL.Image", "images need pillow"), ("sklearn.datasets", "digits needs")]
)
def test_what_is_not_installed_is_named(monkeypatch, module, words):
    if module != "PIL.Image":
        pytest.importorskip("PIL", reason="needs pillow")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"{words}.*not installed: pip install"):
        find_images("digits", "calibration")


def test_class_numbers():
    config = SimpleNamespace(num_labels=3, label2id={"cat": 2, "ant": 0, "bee": 1})
    assert class_numbers(numbered(2, classes=["cat", "bee"]), config) == {"cat": 2, "bee": 1}
    others = numbered(3, classes=["z", "x", "y"])
    assert class_numbers(others, config) == {"x": 0, "y": 1, "z": 2}
    assert class_numbers(numbered(2, classes=[2, 0]), config) == {2: 2, 0: 0}
    with pytest.raises(CalibrationError, match="has 2 class folders, e.g. x, .* the model has 3 classes"):
        class_numbers(numbered(2, classes=["x", "y"]), config)
    with pytest.raises(CalibrationError, match="has class 3, the model has 3 classes"):
        class_numbers(numbered(2, classes=[3, 0]), config)
    with pytest.raises(CalibrationError, match="numbers has no classes"):
        labelled(PixelReader(numbered(2), halves, str), nn.Linear(1, 1), None, "")


class OneHot(nn.Module):
    """Logits of 8 classes: highest for the image's value, then for the classes above it, around."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, pixels):
        value = (2 * pixels[:, 0, 0, 0]).long()
        return -((torch.arange(8)[None] - value[:, None]) % 8).float() + self.zero


def test_accuracy_counts_the_first_and_the_first_five():
    """Image i has class (i + i % 4 * 2) % 8: i % 4 * 2 places down in the order of the logits."""
    images = numbered(40, classes=[(i + i % 4 * 2) % 8 for i in range(40)], broken=(3,))
    reader = PixelReader(images, halves, str)
    images.load, plain = (lambda i: plain(i) if i == 3 else plain(i) * 0 + i % 8), images.load
    steps = []
    found = accuracy(OneHot(), labelled(reader, OneHot(), None, "as it is"), steps.append)
    assert found == {"top1": 10 / 39, "top5": 30 / 39} and steps == list(range(1, 40))
    some = labelled(reader, OneHot(), 4, "as it is")
    assert some.indices == [0, 10, 20, 30] and some.protocol == "numbers, 4 images, as it is"
