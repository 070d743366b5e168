"""SparseGPT in one process: `wanda_fast` against the published pipeline, by perplexity, error and seconds.

    python -m benchmarks.compare_sparsegpt --model DIR --patterns 2:4,unstructured

Both prune the same model, one sequence at a time, in the dtype asked for; the published pipeline goes first.
Its column loop is what `selection` leaves without the three factorings. Wanda's reconstruction errors stand
beside sparsegpt's, block by block. Exit code 1 where a perplexity is off by more than half a percent, or
sparsegpt errs more than wanda in any block.
"""

import copy
import time
from contextlib import contextmanager
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table

import wanda_fast
from benchmarks.published_pipeline import Stopwatch, prune_as_published
from wanda_fast import checkpoint
from wanda_fast.calibration import calibration_tokens
from wanda_fast.evaluation import evaluation_set

PERPLEXITY = 0.005  # relative
FACTORINGS = ("torch.linalg.cholesky", "torch.cholesky_inverse")

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    model: Annotated[str, typer.Option()],
    patterns: str = "2:4,unstructured",
    dataset: str = "pydoc",
    nsamples: int = 16,
    seqlen: int = 512,
    eval_windows: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Prune the model both ways, for each pattern, and print one table."""
    loaded = checkpoint.load(model, dtype, device=device)
    dense = loaded.model.to(device)
    token_ids = calibration_tokens(dataset, loaded.tokenizer, nsamples, seqlen, 0, None)
    evaluation = evaluation_set(dataset, loaded.tokenizer, seqlen, eval_windows)
    columns = ("pattern", "pipeline", "perplexity", "wall s", "statistics s", "factor s", "loop s", "factor")
    table = Table(*columns, title=f"dense {wanda_fast.perplexity(dense, evaluation):.4f}")
    sound = True
    for pattern in patterns.split(","):
        theirs, published = published_run(dense, token_ids, pattern)
        ours, report, errors = our_run(dense, token_ids, pattern)
        expected, found = (wanda_fast.perplexity(each, evaluation) for each in (theirs, ours))
        add_row(table, pattern, "published", expected, published, published)
        add_row(table, pattern, "wanda_fast", found, seconds_of(report), published)
        wanda = errors.block_error()
        lower = [error < wanda[block] for block, error in report.block_error().items()]
        means = [sum(each.values()) / len(each) for each in (report.block_error(), wanda)]
        print(
            f"{pattern}: error {means[0]:.4f}, wanda's {means[1]:.4f}; lower in {sum(lower)} of {len(lower)}"
        )
        sound = sound and all(lower) and abs(found / expected - 1) <= PERPLEXITY
    Console(width=110).print(table)
    raise typer.Exit(0 if sound else 1)


def published_run(dense, token_ids, pattern: str) -> tuple[torch.nn.Module, dict[str, float]]:
    """The pruned model, and seconds by the names of the table."""
    model, stopwatch = copy.deepcopy(dense), Stopwatch(dense.device)
    kept, group = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    began = time.perf_counter()
    with factoring_timed(dense.device) as factoring:
        prune_as_published(model, token_ids, "sparsegpt", kept, group, 0.5, stopwatch)
    wall, seconds = time.perf_counter() - began, stopwatch.seconds
    factor = sum(factoring)
    named = {"wall": wall, "statistics": seconds["statistics"], "factor": factor}
    return model, named | {"loop": seconds["selection"] - factor}


@contextmanager
def factoring_timed(device: torch.device):
    """A list that gets the seconds of each Cholesky factoring and inversion."""
    seconds: list[float] = []

    def timed(function):
        def call(*args, **options):
            _wait_for(device)
            began = time.perf_counter()
            found = function(*args, **options)
            _wait_for(device)
            seconds.append(time.perf_counter() - began)
            return found

        return call

    with (
        patch(FACTORINGS[0], timed(torch.linalg.cholesky)),
        patch(FACTORINGS[1], timed(torch.cholesky_inverse)),
    ):
        yield seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_run(dense, token_ids, pattern: str):
    """The pruned model, the report of a run without errors to time, and that of wanda with its errors."""
    options = dict(dataset=token_ids, sparsity_type=pattern, batch_size=1)
    timed = wanda_fast.prune(copy.deepcopy(dense), prune_method="sparsegpt", measure_error=False, **options)
    model = copy.deepcopy(dense)
    report = wanda_fast.prune(model, prune_method="sparsegpt", **options)
    report.seconds = timed.seconds
    wanda = wanda_fast.prune(copy.deepcopy(dense), prune_method="wanda", measure_error=True, **options)
    return model, report, wanda


def seconds_of(report: wanda_fast.Report) -> dict[str, float]:
    seconds = report.seconds
    named = {"wall": sum(seconds.values()), "statistics": seconds["statistics"]}
    return named | {"factor": seconds["factor"], "loop": seconds["selection"]}


def add_row(
    table: Table, pattern: str, pipeline: str, perplexity: float, seconds: dict, published: dict
) -> None:
    times = ", ".join(
        f"{name} {published[name] / seconds[name]:.1f}x"
        for name in ("wall", "loop")
        if pipeline != "published"
    )
    values = [f"{seconds[name]:.2f}" for name in ("wall", "statistics", "factor", "loop")]
    table.add_row(pattern, pipeline, f"{perplexity:.4f}", *values, times)


if __name__ == "__main__":
    app()
