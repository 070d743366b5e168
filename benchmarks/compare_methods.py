"""What pruning does to a model: one sentence before and after, then several methods side by side.

    wanda-fast prune --model DENSE --prune-method sparsegpt --save-model PRUNED ...
    python -m benchmarks.compare_methods --model PRUNED

The run that wrote PRUNED left its settings and figures in PRUNED/wanda_fast.json. The other methods prune
DENSE with the same settings.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import wanda_fast
from benchmarks import program

app = typer.Typer(add_completion=False)
console = Console(highlight=False, soft_wrap=True)

METHODS = "magnitude,wanda,connect,gated"
PROMPT = "Python is a programming language that"
SETTINGS = ("sparsity_type", "sparsity_ratio", "dataset", "nsamples", "seqlen", "seed")
NOT_PRUNING = ("load", "read", "write", "evaluation")  # phases of a run


@app.command()
def compare(
    model: Annotated[Path, typer.Option(help="A folder that wanda-fast prune --save-model wrote.")],
    methods: Annotated[str, typer.Option(help="Methods to compare it with.")] = METHODS,
    prompt: Annotated[str, typer.Option(help="Text that both models continue.")] = PROMPT,
) -> None:
    """Show what a pruned model writes, then compare its method with others."""
    saved = saved_report(model)
    dense, perplexity = saved.recipe["model"], saved.perplexity
    console.print(f"\n{dense}, perplexity {perplexity['dense']:.2f}:\n    {continuation(dense, prompt)}")
    console.print(f"{model}, perplexity {perplexity['pruned']:.2f}:\n    {continuation(model, prompt)}\n")
    rows = [row(saved, perplexity["pruned"])]
    for method in methods.split(","):
        console.print(f"pruning with {method} ...")
        rows.append(row(*prune_with(method, saved.recipe)))
    table = Table(
        "method", "sparsity", "perplexity", "seconds", title=f"dense perplexity {perplexity['dense']:.2f}"
    )
    for cells in sorted(rows, key=lambda cells: -float(cells[2])):
        table.add_row(*cells)
    console.print(table, f"perplexity on {perplexity['protocol']}")


def saved_report(folder: Path) -> wanda_fast.Report:
    file = folder / "wanda_fast.json"
    if not file.is_file():
        raise typer.BadParameter(f"{folder} is no folder that wanda-fast prune --save-model wrote")
    report = wanda_fast.Report.from_json(file.read_text())
    if "pruned" not in report.perplexity:
        raise typer.BadParameter(f"{folder} was written by a run that measured no perplexity")
    return report


def continuation(folder: str | Path, prompt: str) -> str:
    """The prompt and the model's greedy continuation of it, on one line."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def prune_with(method: str, recipe: dict) -> tuple[wanda_fast.Report, float]:
    """Prune the dense model of `recipe` in memory. Returns the report and the perplexity."""
    model = AutoModelForCausalLM.from_pretrained(recipe["model"])
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    settings = {name: recipe[name] for name in SETTINGS}
    report = wanda_fast.prune(model, tokenizer=tokenizer, prune_method=method, **settings)
    text, windows = recipe["eval_dataset"], recipe["eval_windows"]
    return report, wanda_fast.perplexity(
        model, text, recipe["seqlen"], tokenizer=tokenizer, max_windows=windows
    )


def row(report: wanda_fast.Report, perplexity: float) -> list[str]:
    seconds = sum(value for phase, value in report.seconds.items() if phase not in NOT_PRUNING)
    return [report.recipe["prune_method"], f"{report.sparsity:.4f}", f"{perplexity:.2f}", f"{seconds:.1f}"]


if __name__ == "__main__":
    program.run(app)
