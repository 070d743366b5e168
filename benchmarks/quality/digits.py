"""Trains a small ViT and a small ConvNeXt on scikit-learn's digits, prunes them, and prints their accuracies.

    python -m benchmarks.quality.digits --out DIR

Needs pillow and scikit-learn. A trained model that is in DIR already is not trained again.
"""

from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import wanda_fast
from wanda_fast.data.images import find_images
from wanda_fast.data.pixels import PixelReader, read_all

SIDE, CLASSES = 16, 10
BATCH, LEARNING_RATE = 64, 2e-3
METHODS = ("magnitude", "wanda", "sparsegpt", "admm")
PATTERNS = ("0.5", "0.6", "0.7", "2:4")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the trained models.")],
    seeds: int = 3,
    epochs: int = 40,
    nsamples: int = 512,
    statistics: str = "sequential",
) -> None:
    accuracies: dict[tuple, list[float]] = {}
    for kind, seed in product(("vit", "convnext"), range(seeds)):
        folder = out / f"{kind}-{seed}"
        if not (folder / "model.safetensors").exists():
            train(kind, seed, epochs, folder)
        dense = wanda_fast.evaluate(str(folder), dataset="digits").accuracy["dense"]["top1"]
        accuracies.setdefault((kind, "dense", ""), []).append(dense)
        typer.echo(f"{kind}, seed {seed}: {dense:.2%}")
        for method, pattern in product(METHODS, PATTERNS):
            accuracies.setdefault((kind, method, pattern), []).append(
                pruned_accuracy(folder, method, pattern, nsamples, seed, statistics)
            )
    typer.echo(table(accuracies))


def train(kind: str, seed: int, epochs: int, folder: Path) -> None:
    """Train on four fifths of the digits, moved by up to a pixel, and save model and image processor."""
    from transformers import ViTImageProcessorPil

    torch.manual_seed(seed)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    digits = find_images("digits", "calibration")
    pixels = read_all(PixelReader(digits, processor, typer.echo), range(digits.count))
    labels = torch.tensor(digits.classes)
    model = new_model(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    steps = epochs * -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels)).split(BATCH):
            F.cross_entropy(model(moved(pixels[batch])).logits, labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def new_model(kind: str) -> nn.Module:
    import transformers as hf

    if kind == "vit":
        sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
        config = hf.ViTConfig(**sizes, image_size=SIDE, patch_size=4, num_labels=CLASSES)
        return hf.ViTForImageClassification(config)
    sizes = dict(num_stages=2, depths=[2, 2], hidden_sizes=[32, 64], patch_size=2)
    config = hf.ConvNextConfig(**sizes, layer_scale_init_value=0.1, image_size=SIDE, num_labels=CLASSES)
    return hf.ConvNextForImageClassification(config)


def moved(images: Tensor) -> Tensor:
    right, down = torch.randint(-2, 3, (2,)).tolist()
    return images.roll((right, down), dims=(2, 3))


def pruned_accuracy(
    folder: Path, method: str, pattern: str, nsamples: int, seed: int, statistics: str
) -> float:
    """Top-1 accuracy on every fifth digit."""
    sparsity = {"sparsity_type": pattern} if ":" in pattern else {"sparsity_ratio": float(pattern)}
    report = wanda_fast.prune(
        str(folder),
        prune_method=method,
        dataset="digits",
        eval_dataset="digits",
        nsamples=nsamples,
        seed=seed,
        statistics=statistics,
        **sparsity,
    )
    return report.accuracy["pruned"]["top1"]


def table(accuracies: dict[tuple, list[float]]) -> str:
    """A Markdown table: mean of the seeds, and lowest to highest."""
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
