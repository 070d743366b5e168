"""The command that measures what pruned weights would take on this machine."""

from typing import Annotated

import typer
from rich.console import Console

from wanda_fast.cli import flags
from wanda_fast.cli.tables import bench_table
from wanda_fast.errors import OptionError
from wanda_fast.inference import measure
from wanda_fast.run.resources import usable_device

console = Console()


@flags.takes_flags("bench")
def bench(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model; only its config.json is read.")],
    rows: Annotated[
        str, typer.Option(help="Tokens at once: 1 to 8 in decoding, more in prefill.")
    ] = "1,8,512",
    patterns: Annotated[
        str, typer.Option(help="Sparsities of packed weights, and 2:4 for GPUs.")
    ] = "0.5,0.6,2:4",
    dtype: Annotated[str, typer.Option(help="Of the weights: auto is the model's.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the GPU if there is one.")] = None,
    **options,
) -> None:
    """Time a model's linears here, dense, packed and 2:4, before pruning: what would sparsity gain?"""
    device = None if device is None else str(usable_device(device))
    words = [word.strip() for word in patterns.split(",")]
    measured = measure.bench(model, _numbers(rows), words, dtype, device, **options)
    console.print(bench_table(measured))


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--rows takes numbers between commas, got {text!r}") from error
