"""Perplexity of several methods side by side, on one model, one calibration, one pattern.

    python -m benchmarks.compare_methods --model DIR --methods magnitude,wanda,connect --sparsity-type 2:4

The dense weights are kept and put back before each method. `--with-report` adds the row of a run that
`wanda-fast prune` has already made with the same settings.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import wanda_fast
from benchmarks import program
from wanda_fast.checkpoint import load as checkpoint
from wanda_fast.data.evaluation import evaluation_set
from wanda_fast.model.architecture import find_blocks

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    model: Annotated[str, typer.Option()],
    methods: str = "magnitude,wanda,connect",
    sparsity_type: str = "2:4",
    dataset: str = "pydoc",
    nsamples: int = 16,
    seqlen: int = 512,
    eval_windows: int | None = None,
    dtype: str = "auto",
    with_report: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Prune the model once with each method, and print one table."""
    loaded = checkpoint.load(model, dtype)
    evaluation = evaluation_set(dataset, loaded.tokenizer, seqlen, eval_windows)
    rows = {}
    if with_report:
        report = json.loads(with_report.read_text())
        if report["perplexity"]["protocol"] != evaluation.protocol:
            raise typer.BadParameter(f"{with_report} was measured on {report['perplexity']['protocol']}")
        dense = report["perplexity"]["dense"]
        rows[report["recipe"]["prune_method"]] = (report["sparsity"], report["perplexity"]["pruned"])
    else:
        dense = wanda_fast.perplexity(loaded.model, evaluation)
    weights = [linear.module.weight.data for block in find_blocks(loaded.model) for linear in block.linears]
    originals = [weight.clone() for weight in weights]
    for method in methods.split(","):
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)
        report = wanda_fast.prune(
            loaded.model,
            tokenizer=loaded.tokenizer,
            prune_method=method,
            sparsity_type=sparsity_type,
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
        )
        rows[method] = (report.sparsity, wanda_fast.perplexity(loaded.model, evaluation))
    table = Table("method", "pattern", "sparsity", "perplexity dense", "perplexity pruned")
    for method, (sparsity, pruned) in sorted(rows.items(), key=lambda row: -row[1][1]):
        table.add_row(method, sparsity_type, f"{sparsity:.4f}", f"{dense:.3f}", f"{pruned:.3f}")
    Console().print(f"perplexity on {evaluation.protocol}", table, highlight=False)


if __name__ == "__main__":
    program.run(app)
