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
from wanda_fast import checkpoint
from wanda_fast.architecture import find_blocks

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
    with_report: Annotated[list[Path] | None, typer.Option()] = None,
) -> None:
    """Prune the model once with each method, and print one table."""
    reports = [json.loads(file.read_text()) for file in with_report or ()]
    loaded = checkpoint.load(model, dtype)
    weights = [linear.module.weight.data for block in find_blocks(loaded.model) for linear in block.linears]
    dense = [weight.clone() for weight in weights]
    for method in methods.split(","):
        for weight, original in zip(weights, dense, strict=True):
            weight.copy_(original)
        report = wanda_fast.prune(
            loaded.model,
            tokenizer=loaded.tokenizer,
            prune_method=method,
            sparsity_type=sparsity_type,
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
            eval_dataset=dataset,
            eval_windows=eval_windows,
        )
        reports.append(json.loads(report.to_json()))
    Console().print(_table(reports))


def _table(reports: list[dict]) -> Table:
    protocols = {report["perplexity"]["protocol"] for report in reports}
    if len(protocols) > 1:
        raise typer.BadParameter(f"the reports were measured differently: {'; '.join(sorted(protocols))}")
    table = Table(
        "method", "pattern", "sparsity", "perplexity dense", "perplexity pruned", title=protocols.pop()
    )
    for report in sorted(reports, key=lambda report: -report["perplexity"]["pruned"]):
        recipe, perplexity = report["recipe"], report["perplexity"]
        values = (f"{perplexity['dense']:.3f}", f"{perplexity['pruned']:.3f}")
        table.add_row(recipe["prune_method"], recipe["sparsity_type"], f"{report['sparsity']:.4f}", *values)
    return table


if __name__ == "__main__":
    app()
