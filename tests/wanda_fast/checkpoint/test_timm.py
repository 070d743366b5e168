"""timm's models: the published masks, transformers' wrapper streamed, a file of weights."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

import wanda_fast
from tests.published_vision import prune_published
from tests.tiny_classifiers import images
from wanda_fast import errors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="needs timm, and the torchvision of this torch")


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [
        ("vit_tiny_patch16_224", "timm_vit", 224),
        ("convnext_atto", "timm_convnext", 32),
        ("swin_tiny_patch4_window7_224", "timm_swin", 224),
    ],
)
def test_masks_are_those_of_the_published_loop(timm, name, kind, side):
    model, reference = (timm.create_model(name, num_classes=10).eval() for _ in range(2))
    reference.load_state_dict(model.state_dict())
    pixels = images(2, side)
    expected = prune_published(reference, kind, pixels, "wanda", "0.5")
    report = wanda_fast.prune(model, dataset=pixels, statistics="dense")
    assert report.linears.keys() == expected.keys()
    # Among millions of weights some scores tie up to rounding, and the batch decides about the last bits.
    for name, mask in expected.items():
        found = model.get_submodule(name).weight.flatten(1) == 0
        assert (found != mask).float().mean() < 1e-5, name


@pytest.fixture
def wrapped(timm):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="convnext_atto", num_labels=10))


def test_a_wrapped_model_is_streamed(wrapped, tmp_path):
    wrapped.eval().save_pretrained(tmp_path / "dense")
    pixels = images(3, 32)
    wanda_fast.prune(str(tmp_path / "dense"), dataset=pixels, save_model=tmp_path / "out")
    wanda_fast.prune(wrapped, dataset=pixels)
    saved = type(wrapped).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in wrapped.state_dict().items())


def test_weights_of_a_file(wrapped, tmp_path):
    file, pixels = tmp_path / "weights.pth", images(3, 32)
    torch.save({"model": wrapped.timm_model.state_dict(), "epoch": 3}, file)
    options = dict(dataset=pixels, checkpoint=file, save_model=tmp_path / "out")
    wanda_fast.prune("convnext_atto", **options)
    wanda_fast.prune(wrapped.eval(), dataset=pixels)
    saved = type(wrapped).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in wrapped.state_dict().items())
    for name, words in (
        ("no_such", "does not fit timm's no_such"),
        ("resnet18", "it lacks 102 of the model's"),
    ):
        with pytest.raises(errors.CheckpointError, match=words):
            wanda_fast.prune(name, dataset=pixels, checkpoint=file)


def test_files_that_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    file.write_text("hello")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
        for name, words in (("weights.pth", "cannot be read"), ("none.pth", "none.pth does not exist")):
            with pytest.raises(errors.CheckpointError, match=words):
                wanda_fast.prune("convnext_atto", dataset=images(1), checkpoint=tmp_path / name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingDependencyError, match="timm, which is not installed: pip install timm"):
        wanda_fast.prune("convnext_atto", dataset=images(1), checkpoint=file)
