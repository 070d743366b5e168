"""What pruning costs in perplexity: methods x patterns x calibration sizes x seeds on one model.

    python -m benchmarks.quality --model DIR --methods wanda,connect --patterns 0.5,2:4 --seeds 3

A cell that the results file holds already is not run again, so a table grows by further calls.
"""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

import wanda_fast
from benchmarks import program
from benchmarks.core import machine
from benchmarks.quality.results import Cell, Results
from wanda_fast.checkpoint import load as checkpoint
from wanda_fast.data.calibration import calibration_tokens
from wanda_fast.data.evaluation import evaluation_set
from wanda_fast.model.architecture import find_blocks

app = typer.Typer(add_completion=False)

Model = Annotated[str, typer.Option(help="Folder, GGUF file or hub id.")]
Label = Annotated[str | None, typer.Option(help="Name of the results file. Default: the model's folder.")]
Methods = Annotated[
    str,
    typer.Option(help="Comma-separated; METHOD+obs adds SparseGPT's update, METHOD@KEYWORD=VALUE an option."),
]
Patterns = Annotated[str, typer.Option(help="Comma-separated ratios and N:M.")]


@app.command()
def run(
    model: Model,
    label: Label = None,
    methods: Methods = "magnitude,wanda,connect",
    patterns: Patterns = "0.5,4:8,2:4",
    nsamples: Annotated[str, typer.Option(help="Comma-separated numbers of calibration windows.")] = "16",
    seqlen: int = 512,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1 of the calibration windows.")] = 3,
    dataset: Annotated[str, typer.Option(help="Calibration text.")] = "wikitext2",
    eval_dataset: Annotated[str, typer.Option(help="Text of the perplexity.")] = "wikitext2",
    eval_windows: int = 32,
    dtype: str = "bfloat16",
) -> None:
    """Prune and measure each combination once; the dense weights are put back before each."""
    loaded = checkpoint.load(model, dtype)
    evaluation = evaluation_set(eval_dataset, loaded.tokenizer, seqlen, eval_windows)
    results = Results.open(label or Path(model).name)
    measured_on = evaluation.protocol.replace(evaluation.label, Path(evaluation.label).name)
    protocol = f"{dtype}; calibration {Path(dataset).name}, windows of {seqlen}; perplexity on {measured_on}"
    results.require_protocol(protocol, lambda: wanda_fast.perplexity(loaded.model, evaluation))
    weights = [linear.weight.data for block in find_blocks(loaded.model) for linear in block.linears]
    originals = [weight.clone() for weight in weights]
    combinations = product(range(seeds), patterns.split(","), map(int, nsamples.split(",")))
    for seed, pattern, size in combinations:
        for method in methods.split(","):
            key = (method, pattern, *((0, 0) if method == "magnitude" else (size, seed)))  # no calibration
            if results.has(*key):
                continue
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
            tokens = calibration_tokens(dataset, loaded.tokenizer, size, seqlen, seed)
            report = wanda_fast.prune(loaded.model, dataset=tokens, **options(method, pattern))
            perplexity = wanda_fast.perplexity(loaded.model, evaluation)
            facts = machine.describe("cpu")
            by = (facts["commit"], facts["cpu_capability"])
            results.add(Cell(*key, perplexity, report.sparsity, *by))
            typer.echo(f"{method} {pattern} {size} x {seqlen} seed {seed}: {perplexity:.3f}")


def options(method: str, pattern: str) -> dict:
    """Keywords of `wanda_fast.prune`."""
    method, *keywords = method.split("@")
    name, _, update = method.partition("+")
    chosen = {"prune_method": name} | ({"update": update} if update else {})
    for keyword in keywords:
        key, _, value = keyword.partition("=")
        chosen[key] = int(value) if value.isdecimal() else value
    if ":" in pattern:
        return chosen | {"sparsity_type": pattern}
    return chosen | {"sparsity_type": "unstructured", "sparsity_ratio": float(pattern)}


if __name__ == "__main__":
    program.run(app)
