"""SparseGPT in one process: `wanda_fast` against the published pipeline, by perplexity, error and seconds.

    python -m benchmarks.compare_sparsegpt --model DIR --patterns 2:4,unstructured

Both prune the same model in the dtype asked for; the published pipeline goes first. Ours is timed as it runs
by default, and compared as it runs with one sequence at a time, like the published. Its column loop is what
`selection` leaves without the three factorings. Wanda's reconstruction errors stand beside sparsegpt's,
block by block.

From end to end the perplexities are for information: near ties go by the last bit of a sum, updates carry
that on, and each block feeds the next. `--orders 3` runs both with the calibration sequences in three orders,
the same sums but for their rounding: the spread of one pipeline says what a difference of the two is worth.
`--orders 0` leaves all that out. What has to agree is each block on the same inputs: the published algorithm
prunes it from what it saw in our pruned model, and the model of those blocks is held against ours. Exit code
1 where their perplexities are more than half a percent apart, or their masks more than that (perplexity alone
has been seen to miss twice the dampening), or sparsegpt errs more than wanda in any block.
"""

import copy
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table

import wanda_fast
from benchmarks import program
from benchmarks.published_pipeline import Stopwatch, prune_as_published
from benchmarks.quality_results import mean_and_std
from wanda_fast.checkpoint import load as checkpoint
from wanda_fast.data.calibration import calibration_tokens
from wanda_fast.data.evaluation import EvaluationSet, evaluation_set
from wanda_fast.pruning.patterns import parse_pattern

PERPLEXITY, MASKS = 0.005, 0.995  # relative difference, mean share in common; on the same inputs
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
    orders: Annotated[int, typer.Option(help="Runs of each from end to end, each in another order.")] = 1,
) -> None:
    """Prune the model both ways, for each pattern, and print one table."""
    for pattern in patterns.split(","):
        parse_pattern(pattern, 0.5)  # a wrong one is refused before the work
    loaded = checkpoint.load(model, dtype, device=device)
    dense = loaded.model.to(device)
    token_ids = calibration_tokens(dataset, loaded.tokenizer, nsamples, seqlen, 0, None)
    evaluation = evaluation_set(dataset, loaded.tokenizer, seqlen, eval_windows)
    columns = ("pattern", "pipeline", "perplexity", "wall s", "statistics s", "factor s", "loop s", "factor")
    table = Table(*columns)
    print(f"dense: {wanda_fast.perplexity(dense, evaluation):.4f}; {evaluation.protocol}", flush=True)
    sound = True
    for pattern in patterns.split(","):
        ours = copy.deepcopy(dense)
        errors = wanda_fast.prune(ours, **our_options(token_ids, pattern)).block_error()
        same = same_inputs(dense, ours, token_ids, pattern, evaluation)
        print(f"{pattern}: {same}", flush=True)
        wanda = wanda_errors(dense, token_ids, pattern)
        lower = [error < wanda[block] for block, error in errors.items()]
        means = [statistics.mean(each.values()) for each in (errors, wanda)]
        print(
            f"{pattern}: error {means[0]:.4f}, wanda's {means[1]:.4f}; lower in {sum(lower)} of {len(lower)}",
            flush=True,
        )
        sound = sound and same.agrees and all(lower)
        if orders:
            end_to_end(table, dense, token_ids, pattern, orders, evaluation)
    if orders:
        Console(width=110).print(table)
    raise typer.Exit(0 if sound else 1)


@dataclass
class SameInputs:
    """The model of blocks that the published algorithm pruned from our blocks' inputs, against ours.

    `masks` and `weights` are by block: the share of weights that both prune or both keep; the largest
    difference of weights, relative to the largest of their linear, in rows whose masks are equal.
    """

    published: float
    ours: float
    masks: list[float]
    weights: list[float]

    @property
    def apart(self) -> float:
        return self.ours / self.published - 1

    @property
    def agrees(self) -> bool:
        return abs(self.apart) <= PERPLEXITY and statistics.mean(self.masks) >= MASKS

    def __str__(self) -> str:
        return (
            f"on the same inputs, published {self.published:.4f}, wanda_fast {self.ours:.4f}, "
            f"{self.apart:+.3%} apart; masks in common {statistics.mean(self.masks):.3%}, "
            f"{min(self.masks):.3%} in block {self.masks.index(min(self.masks))}; "
            f"weights within {max(self.weights):.0e} of the largest where masks are equal"
        )


def same_inputs(dense, ours, token_ids, pattern: str, evaluation: EvaluationSet) -> SameInputs:
    """The published algorithm on each block, from the inputs that it saw in `ours`, pruned already."""
    theirs, _ = published_run(dense, token_ids, pattern, follow=ours)
    perplexities = [wanda_fast.perplexity(model, evaluation) for model in (theirs, ours)]
    blocks = zip(theirs.model.layers, ours.model.layers, strict=True)
    masks, weights = zip(*(agreement(*block) for block in blocks), strict=True)
    return SameInputs(*perplexities, list(masks), list(weights))


def agreement(theirs: torch.nn.Module, ours: torch.nn.Module) -> tuple[float, float]:
    """Of one block: `masks` and `weights` as in `SameInputs`."""
    equal = total = 0
    furthest = 0.0
    for name, linear in theirs.named_modules():
        if isinstance(linear, torch.nn.Linear):
            expected, found = linear.weight.detach().float(), ours.get_submodule(name).weight.detach().float()
            same = (expected == 0) == (found == 0)
            equal, total = equal + same.sum().item(), total + same.numel()
            rows = same.all(dim=1, keepdim=True)  # a weight pruned otherwise changes its whole row
            difference = ((expected - found) * rows).abs().max() / expected.abs().max()
            furthest = max(furthest, difference.item())
    return equal / total, furthest


def end_to_end(table: Table, dense, token_ids, pattern: str, orders: int, evaluation: EvaluationSet) -> None:
    """Both pipelines with the sequences in each order; adds their rows of the table, timed in the first."""
    expected, found, published = [], [], {}
    for order in range(orders):
        ids = token_ids[torch.randperm(len(token_ids), generator=torch.Generator().manual_seed(order))]
        theirs, seconds = published_run(dense, ids, pattern)
        published = published or seconds
        expected.append(wanda_fast.perplexity(theirs, evaluation))
        del theirs
        ours = copy.deepcopy(dense)
        wanda_fast.prune(ours, **our_options(ids, pattern))
        found.append(wanda_fast.perplexity(ours, evaluation))
        print(
            f"{pattern}, order {order}: published {expected[-1]:.4f}, wanda_fast {found[-1]:.4f}", flush=True
        )
    apart = statistics.mean(found) / statistics.mean(expected) - 1
    print(f"{pattern}: from end to end, mean perplexities {apart:+.2%} apart")
    add_row(table, pattern, "published", expected, published, published)
    timed = seconds_of(our_run(dense, token_ids, pattern))
    add_row(table, pattern, "wanda_fast", found, timed, published)


def published_run(dense, token_ids, pattern: str, follow=None) -> tuple[torch.nn.Module, dict[str, float]]:
    """The pruned model, and seconds by the names of the table. `follow`: see `prune_as_published`."""
    model, stopwatch = copy.deepcopy(dense), Stopwatch(dense.device)
    kept, group = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    began = time.perf_counter()
    with factoring_timed(dense.device) as factoring:
        prune_as_published(model, token_ids, "sparsegpt", kept, group, 0.5, stopwatch, follow=follow)
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
    program.run(app)
