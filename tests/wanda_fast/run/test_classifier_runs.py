"""Runs on image classifiers: streamed, resumed, by the published flags, bare modules, refusals."""

import json
import sys

import numpy
import pytest
import torch
from torch import nn

import wanda_fast
from tests.tiny_classifiers import CLASSES, SIDE, build, images
from tests.tiny_models import FAMILIES, token_ids
from tests.wanda_fast.output.resume.runs import stop_in
from wanda_fast import errors
from wanda_fast.cli import main as cli
from wanda_fast.model.architecture import find_blocks
from wanda_fast.output import streamed as output

pytestmark = pytest.mark.usefixtures("one_thread")
PIXELS = images(5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder of its checkpoint, without an image processor."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("deit", "convnext", "swin")}
    for kind, folder in made.items():
        build(kind).save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("deit", dict(prune_method="sparsegpt")),
        ("convnext", dict(sparsity_type="2:4", activations="disk")),
        ("swin", dict(prune_method="admm", sequential="linear")),
        ("swin", dict(statistics="dense", prune_granularity="layer")),
    ],
)
def test_streamed_is_in_memory(folders, tmp_path, kind, options):
    model = build(kind)
    wanda_fast.prune(model, dataset=PIXELS, batch_size=2, **options)
    report = wanda_fast.prune(
        str(folders[kind]), dataset=PIXELS, batch_size=2, save_model=tmp_path / "out", **options
    )
    assert report.calibration["shape"] == [5, 3, SIDE, SIDE]
    assert_same(tmp_path / "out", model)


@pytest.mark.parametrize("statistics", ["sequential", "dense"])
@pytest.mark.parametrize("block", range(3))
def test_a_stopped_run_goes_on_in_any_stage(folders, tmp_path, monkeypatch, block, statistics):
    """ConvNeXt's four blocks are in three stages."""
    options = dict(dataset=PIXELS, statistics=statistics, save_model=tmp_path / "out")
    with monkeypatch.context() as patch:
        write_block = output.StreamedOutput.write_block
        patch.setattr(output.StreamedOutput, "write_block", stop_in(block, write_block))
        with pytest.raises(errors.InterruptedRunError, match=f"stopped after block {block + 1} of 4"):
            wanda_fast.prune(str(folders["convnext"]), **options)
    if block == 1:
        # Without the cached activations, the finished blocks are run again.
        for file in (tmp_path / "out.partial").glob("boundary*"):
            file.unlink()
    wanda_fast.prune(str(folders["convnext"]), resume=True, **options)
    model = build("convnext")
    wanda_fast.prune(model, dataset=PIXELS, statistics=statistics)
    assert_same(tmp_path / "out", model)


class Block(nn.Module):
    """An inverted bottleneck of 1x1 convolutions, as some of timm's ConvNeXts have it."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return x + self.down(self.up(self.depthwise(x)).relu())


class Bare(nn.Module):
    """A module of no library, with stages in an nn.Sequential; it returns logits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        stages = [nn.Sequential(Block(8), Block(8)), nn.Sequential(nn.Conv2d(8, 12, 2, 2), Block(12))]
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def test_a_bare_module_with_convolutions():
    """Weights as a matrix, inputs [n, in, h, w]; the downsampling in the second stage is no block."""
    model, reference = Bare(), Bare()
    reference.load_state_dict(model.state_dict())
    options = dict(sparsity_ratio=0.25, batch_size=2, statistics="sequential")
    report = wanda_fast.prune(model, dataset=PIXELS, **options)
    names = [f"stages.{block}.{x}" for block in ("0.0", "0.1", "1.1") for x in ("up", "down")]
    assert list(report.linears) == names
    for pair in zip(names[::2], names[1::2], strict=True):
        masks = [straight_mask(reference, reference.get_submodule(name)) for name in pair]
        for name, mask in zip(pair, masks, strict=True):
            reference.get_submodule(name).weight.data[:, :, 0, 0].masked_fill_(mask, 0)
    for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(found, expected), name


def straight_mask(model, convolution):
    """True for the quarter of each row with the lowest abs(W) * norm of the input, by a whole forward."""
    inputs = []
    hook = convolution.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    with torch.no_grad():
        model(PIXELS)
    hook.remove()
    scores = convolution.weight[:, :, 0, 0].abs() * inputs[0].square().sum(dim=(0, 2, 3)).sqrt()
    lowest = scores.sort(dim=1, stable=True).indices[:, : scores.shape[1] // 4]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def test_statistics_are_of_the_dense_model_by_default():
    models = {statistics: build("swin") for statistics in (None, "dense", "sequential")}
    for statistics, model in models.items():
        wanda_fast.prune(model, dataset=PIXELS, statistics=statistics)
    by_default, dense, sequential = (
        torch.cat([weight.flatten() for weight in model.parameters()]) for model in models.values()
    )
    assert torch.equal(by_default, dense) and not torch.equal(dense, sequential)


def test_sequential_lists_without_gaps_run_block_by_block():
    stages = [nn.Sequential(Block(8), Block(8)), nn.Sequential(Block(8))]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), nn.Sequential(*stages), nn.Flatten(), nn.Linear(512, CLASSES)
    )
    assert [block.name for block in find_blocks(model)] == ["1.0.0", "1.0.1", "1.1.0"]
    report = wanda_fast.prune(model, dataset=PIXELS, sparsity_type="2:4", prune_method="sparsegpt")
    assert report.sparsity == 0.5 and len(report.linears) == 6


@pytest.fixture
def data(tmp_path, folders):
    """ROOT with train and val of 10 class folders, and a checkpoint with an image processor."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    pixels = numpy.random.RandomState(0)
    for split in ("train", "val"):
        for number in range(CLASSES):
            (tmp_path / f"data/{split}/c{number}").mkdir(parents=True)
            picture = image.fromarray(pixels.randint(0, 255, (20, 24, 3), dtype=numpy.uint8))
            picture.save(tmp_path / f"data/{split}/c{number}/0.png")
    model = tmp_path / "model"
    build("deit").save_pretrained(model)
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = dict(image_processor_type="ViTImageProcessor", size=dict(height=SIDE, width=SIDE), **half)
    (model / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path


def assert_same(folder, model):
    """The checkpoint in `folder` is the model, bit for bit."""
    saved = type(model).from_pretrained(folder).state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["wanda-fast", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code or 0, capsys.readouterr()


def straight_pixels(root, split, processor):
    from PIL import Image

    files = sorted((root / "data" / split).rglob("*.png"))
    return torch.cat(
        [processor(images=Image.open(file), return_tensors="pt")["pixel_values"] for file in files]
    )


def test_the_published_flags_on_folders(data, monkeypatch, capsys):
    from transformers import AutoImageProcessor

    out = data / "out"
    code, said = run(
        monkeypatch, capsys, "prune", "--model", data / "model", "--data_path", data / "data",
        "--sparsity", 0.6, "--prune_metric", "wanda", "--prune_granularity", "layer", "--nsamples", 7,
        "--statistics", "dense", "--save_model", out,
    )  # fmt: skip
    assert code == 0, said.err
    processor = AutoImageProcessor.from_pretrained(data / "model")
    drawn = numpy.random.RandomState(0).choice(10, 7)
    model = build("deit")
    report = wanda_fast.prune(
        model,
        dataset=straight_pixels(data, "train", processor)[drawn],
        sparsity_ratio=0.6,
        prune_granularity="layer",
        statistics="dense",
    )
    assert_same(out, model)
    assert 0.59 < report.sparsity < 0.61
    right = model(straight_pixels(data, "val", processor)).logits.topk(5).indices == torch.arange(10)[:, None]
    shares = f"top-1 {right[:, 0].float().mean():.2%}, top-5 {right.any(1).float().mean():.2%}"
    assert f"accuracy, pruned │ {shares}" in " ".join(said.out.split())
    assert "val, 10 images, resized to 16x16, mean 0.5 0.5 0.5" in " ".join(said.out.split())
    code, said = run(monkeypatch, capsys, "eval", out, "--dataset", data / "data")
    assert code == 0 and f"accuracy {shares} (" in said.out


def refused(words, kind=errors.CalibrationError, **options):
    with pytest.raises(kind, match=words):
        wanda_fast.prune(**options)


def test_other_data_than_images_is_refused(folders):
    folder = str(folders["deit"])
    refused("dataset wikitext2 is text, and DeiT.* takes images", model=folder)
    refused(
        "images must be floating-point pixel values .* got torch.int64", model=folder, dataset=PIXELS.long()
    )
    refused(
        r"does not take images \[3, height, width\] = \[3, 8, 8\]", model=folder, dataset=images(2, side=8)
    )
    refused(r"does not take images .* \[1, 16, 16\]", model=folder, dataset=PIXELS[:, :1])
    refused("pixel values have no classes", model=folder, dataset=PIXELS, eval_dataset=PIXELS)
    text = FAMILIES["llama2"]()
    refused(r"token ids must be integers \[nsamples, seqlen\]", model=text, dataset=PIXELS)
    refused(
        "has no config of transformers", errors.LiveModelError, model=Bare(), dataset=token_ids(text, 2, 8)
    )


def test_blocks_that_change_the_shape_are_refused():
    model = Bare()
    model.stages[0][1].depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
    model.stages[0][1].forward = lambda x: model.stages[0][1].depthwise(x)
    words = r"stages.0.1 makes \[8, 4, 4\] of hidden states \[8, 8, 8\]: only blocks that keep the shape"
    refused(words, errors.HiddenStatesError, model=model, dataset=PIXELS)
    assert wanda_fast.prune(model, dataset=PIXELS, prune_method="magnitude").sparsity > 0.49


def test_options_that_exclude_each_other(folders):
    model = build("deit")
    refused(
        "statistics dense and sequential linear", errors.OptionError, model=model, dataset=PIXELS,
        statistics="dense", sequential="linear",
    )  # fmt: skip
    for options in (dict(sparsity_type="2:4"), dict(use_variant=True)):
        refused(
            "prune_granularity row is for unstructured", errors.PatternError, model=model, dataset=PIXELS,
            prune_granularity="row", **options,
        )  # fmt: skip
    for options in (dict(prune_method="sparsegpt"), dict(prune_method="admm"), dict(refine=2)):
        refused(
            "takes no prune_granularity layer", errors.PatternError, model=model, dataset=PIXELS,
            prune_granularity="layer", **options,
        )  # fmt: skip


def test_a_folder_needs_an_image_processor(data, folders):
    refused("image processor of .* cannot be loaded", model=str(folders["deit"]), dataset=data / "data")
    refused("need the model's image processor: pass it", model=build("deit"), dataset=data / "data")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_draws_no_images(data, seed):
    refused(
        rf"seed must be in \[0, 2\^32\) for images, got {seed}",
        errors.OptionError,
        model=str(data / "model"),
        dataset=data / "data",
        seed=seed,
    )
