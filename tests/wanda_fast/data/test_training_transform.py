"""timm's transform for training: the published code's, repeatable, refused where it has no meaning."""

import random
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

import wanda_fast
from tests import tiny_models
from tests.tiny_classifiers import build, images
from wanda_fast import errors
from wanda_fast.data.training_transform import TrainingTransform, drawn_from

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)


def processor(images, return_tensors):
    """Gives 32 x 32 pixels of whatever size the images have."""
    return {"pixel_values": torch.zeros(len(images), 3, 32, 32)}


processor.image_mean, processor.image_std = MEAN, STD


def picture(seed):
    return numpy.random.RandomState(seed).randint(0, 256, (40, 50, 3), dtype="uint8")


@pytest.fixture
def timm_data():
    pytest.importorskip("timm", reason="needs timm")
    return pytest.importorskip(
        "timm.data", reason="needs the torchvision of this torch", exc_type=RuntimeError
    )


def test_pixels_are_those_of_the_published_transform(timm_data):
    from PIL import Image

    published = timm_data.create_transform(
        input_size=32,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=STD,
    )
    pictures = [picture(seed) for seed in range(8)]
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)
    expected = [published(Image.fromarray(each)) for each in pictures]
    transform = TrainingTransform(processor)
    for _ in range(2):  # repeatable
        with drawn_from(3):
            found = [transform([each])["pixel_values"][0] for each in pictures]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len({each.sum().item() for each in found}) == 8


def test_a_run_through_it(timm_data, tmp_path):
    from PIL import Image
    from transformers import ViTImageProcessor

    for seed in range(4):
        Image.fromarray(picture(seed)).save(tmp_path / f"{seed}.png")
    model = build("vit")
    own, digests = {"size": {"height": model.config.image_size, "width": model.config.image_size}}, []
    for transform in ("eval", "train", "train"):
        report = wanda_fast.prune(
            build("vit"),
            dataset=tmp_path,
            tokenizer=ViTImageProcessor(**own),
            image_transform=transform,
        )
        assert report.calibration["transform"] == transform
        digests.append(report.calibration["sha256"])
    assert digests[0] != digests[1] == digests[2]


def test_the_global_generators_are_left_as_they_were():
    def draws():
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(7)
    expected = draws()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(7)
    with drawn_from(1):
        first = draws()
    assert draws() == expected != first
    with drawn_from(1):
        assert draws() == first


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(errors.MissingDependencyError, match="train needs timm, and the torch"):
        TrainingTransform(SimpleNamespace())


def test_where_it_has_no_meaning():
    classifier, model = build("vit"), tiny_models.build("llama2")
    with pytest.raises(errors.CalibrationError, match="train is for images: pixel values are used as they"):
        wanda_fast.prune(classifier, dataset=images(2), image_transform="train")
    with pytest.raises(errors.CalibrationError, match="is for image classifiers, and LlamaForCausalLM takes"):
        wanda_fast.prune(model, dataset=tiny_models.token_ids(model, 2, 16), image_transform="train")
