"""Trains a small ViT and a small ConvNeXt on scikit-learn's digits, prunes them, and prints their accuracies.

    python -m benchmarks.quality.digits --out DIR

Needs pillow and scikit-learn. A trained model that is in DIR already is not trained again.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from transformers import AutoImageProcessor

import wanda_fast
from wanda_fast.data.images import as_indices, find_images
from wanda_fast.data.pixels import PixelReader, read_all

SIDE, CLASSES = 16, 10
BATCH, LEARNING_RATE = 64, 2e-3
METHODS = ("magnitude", "wanda", "sparsegpt", "admm")
PATTERNS = ("0.5", "0.6", "0.7", "2:4")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the trained models.")],
    seeds: int = 3,
    epochs: int = 30,
    nsamples: int = 512,
    statistics: str = "dense",
) -> None:
    processor = processor_in(out)
    train_images, test_images = (read(purpose, processor) for purpose in ("calibration", "evaluation"))
    accuracies: dict[tuple, list[float]] = {}
    for seed, kind in product(range(seeds), ("vit", "convnext")):
        model = trained(kind, seed, epochs, out / f"{kind}-{seed}", *train_images)
        accuracies.setdefault((kind, "dense", ""), []).append(top1(model, *test_images))
        drawn = train_images[0][as_indices(find_images("digits", "calibration"), nsamples, seed)]
        for method, pattern in product(METHODS, PATTERNS):
            pruned = deepcopy(model)
            sparsity = {"sparsity_type": pattern} if ":" in pattern else {"sparsity_ratio": float(pattern)}
            wanda_fast.prune(pruned, prune_method=method, dataset=drawn, statistics=statistics, **sparsity)
            accuracies.setdefault((kind, method, pattern), []).append(top1(pruned, *test_images))
        typer.echo(f"{kind}, seed {seed}:\n{table(accuracies)}")


def processor_in(folder: Path) -> Callable:
    """The models' image processor; its file is written to `folder`."""
    halves = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    steps = dict(image_processor_type="ViTImageProcessor", size=dict(height=SIDE, width=SIDE), **halves)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    return AutoImageProcessor.from_pretrained(folder)


def read(purpose: str, processor: Callable) -> tuple[Tensor, Tensor]:
    """Pixel values and classes of the digits for "calibration" or "evaluation"."""
    digits = find_images("digits", purpose)
    pixels = read_all(PixelReader(digits, processor, typer.echo), range(digits.count))
    return pixels, torch.tensor(digits.classes)


def trained(kind: str, seed: int, epochs: int, folder: Path, pixels: Tensor, labels: Tensor) -> nn.Module:
    """The model in `folder`, after training on digits that are moved by up to a pixel of the originals."""
    torch.manual_seed(seed)
    model = new_model(kind)
    if (folder / "model.safetensors").exists():
        return type(model).from_pretrained(folder).eval()
    optimizer = torch.optim.AdamW(model.train().parameters(), LEARNING_RATE, weight_decay=0.05)
    steps = epochs * -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels)).split(BATCH):
            F.cross_entropy(model(moved(pixels[batch])).logits, labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval().save_pretrained(folder)
    processor_in(folder)
    return model


def new_model(kind: str) -> nn.Module:
    import transformers as hf

    # Weights of this width would be too small with the models' own 0.02.
    common = dict(image_size=SIDE, num_labels=CLASSES, initializer_range=0.1)
    if kind == "vit":
        sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
        return hf.ViTForImageClassification(hf.ViTConfig(**common, **sizes, patch_size=4))
    sizes = dict(num_stages=2, depths=[2, 2], hidden_sizes=[32, 64], layer_scale_init_value=0.1)
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**common, **sizes, patch_size=2))


def moved(images: Tensor) -> Tensor:
    right, down = torch.randint(-2, 3, (2,)).tolist()
    return images.roll((right, down), dims=(2, 3))


@torch.no_grad()
def top1(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    return (model(pixels).logits.argmax(dim=1) == labels).float().mean().item()


def table(accuracies: dict[tuple, list[float]]) -> str:
    """A Markdown table of top-1 accuracy in percent: mean of the seeds, and lowest to highest."""
    lines = ["| model | method | " + " | ".join(PATTERNS) + " |", "|---|---|" + "---|" * len(PATTERNS)]
    for kind in dict.fromkeys(key[0] for key in accuracies):
        dense = _cell(accuracies[kind, "dense", ""])
        for method in METHODS:
            cells = [_cell(accuracies[kind, method, pattern]) for pattern in PATTERNS]
            lines.append(f"| {kind}, dense {dense} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{100 * mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    typer.run(main)
