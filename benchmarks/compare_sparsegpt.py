"""SparseGPT in one process: `wanda_fast` against the published pipeline, by perplexity, error and seconds.

    python -m benchmarks.compare_sparsegpt --model DIR --patterns 2:4,unstructured

Both prune the same model in the dtype asked for; the published pipeline goes first. Ours is timed as it runs
by default, and compared as it runs with one sequence at a time, like the published. Its column loop is what
`selection` leaves without the three factorings. Wanda's reconstruction errors stand beside sparsegpt's,
block by block. `--orders 3` runs both with the calibration sequences in three orders: the same sums but for
their rounding, so that the spread of one pipeline says what a difference between the two is worth. Exit code
1 where the mean perplexities are more than half a percent apart, or sparsegpt errs more than wanda in any
block.
"""

import copy
import statistics
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
from benchmarks.quality_results import mean_and_std
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
    orders: Annotated[int, typer.Option(help="Runs of each, with the sequences in so many orders.")] = 1,
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
        expected, found = [], []
        for order in range(orders):
            ids = token_ids[torch.randperm(nsamples, generator=torch.Generator().manual_seed(order))]
            theirs, seconds = published_run(dense, ids, pattern)
            expected.append(wanda_fast.perplexity(theirs, evaluation))
            del theirs
            ours = copy.deepcopy(dense)
            last = wanda_fast.prune(ours, **our_options(ids, pattern))
            found.append(wanda_fast.perplexity(ours, evaluation))
            print(
                f"{pattern}, order {order}: published {expected[-1]:.4f}, wanda_fast {found[-1]:.4f}",
                flush=True,
            )
            if order == 0:
                published, report = seconds, last
        timed = our_run(dense, token_ids, pattern)
        add_row(table, pattern, "published", expected, published, published)
        add_row(table, pattern, "wanda_fast", found, seconds_of(timed), published)
        wanda = wanda_errors(dense, token_ids, pattern)
        lower = [error < wanda[block] for block, error in report.block_error().items()]
        means = [sum(each.values()) / len(each) for each in (report.block_error(), wanda)]
        print(
            f"{pattern}: error {means[0]:.4f}, wanda's {means[1]:.4f}; lower in {sum(lower)} of {len(lower)}"
        )
        apart = statistics.mean(found) / statistics.mean(expected) - 1
        print(f"{pattern}: mean perplexities {apart:+.2%} apart")
        sound = sound and all(lower) and abs(apart) <= PERPLEXITY
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


def our_options(token_ids, pattern: str) -> dict:
    return dict(prune_method="sparsegpt", dataset=token_ids, sparsity_type=pattern, batch_size=1)


def our_run(dense, token_ids, pattern: str) -> wanda_fast.Report:
    """As by default, but for the reconstruction errors, which the published pipeline does not measure."""
    options = our_options(token_ids, pattern) | {"batch_size": None, "measure_error": False}
    return wanda_fast.prune(copy.deepcopy(dense), **options)


def wanda_errors(dense, token_ids, pattern: str) -> dict[str, float]:
    options = our_options(token_ids, pattern) | {"prune_method": "wanda", "measure_error": True}
    return wanda_fast.prune(copy.deepcopy(dense), **options).block_error()


def seconds_of(report: wanda_fast.Report) -> dict[str, float]:
    seconds = report.seconds
    named = {"wall": sum(seconds.values()), "statistics": seconds["statistics"]}
    return named | {"factor": seconds["factor"], "loop": seconds["selection"]}


def add_row(
    table: Table, pattern: str, pipeline: str, perplexities: list[float], seconds: dict, published: dict
) -> None:
    times = ", ".join(
        f"{name} {published[name] / seconds[name]:.1f}x"
        for name in ("wall", "loop")
        if pipeline != "published"
    )
    values = [f"{seconds[name]:.2f}" for name in ("wall", "statistics", "factor", "loop")]
    table.add_row(pattern, pipeline, mean_and_std(dict(enumerate(perplexities))), *values, times)


if __name__ == "__main__":
    app()
