"""The commands that pack a checkpoint and unpack it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from wanda_fast.cli import flags
from wanda_fast.cli.progress import terminal_progress
from wanda_fast.output import packing

console = Console()

Out = Annotated[Path, typer.Argument(help="The folder to write.")]


@flags.takes_flags("pack")
def pack(
    folder: Annotated[str, typer.Argument(help="Folder or hub id of a pruned model, in safetensors.")],
    out: Out,
    **options,
) -> None:
    """Pack a pruned model without loss: a bit for every weight, and the weights that are not zero."""
    with terminal_progress(console) as progress:
        sizes = packing.pack(folder, out, progress=progress, **options)
    table = Table(title="packed", show_header=False)
    for row in sizes.rows():
        table.add_row(*row)
    console.print(table)
    typer.echo(f"written: {out}")


@flags.takes_flags("unpack")
def unpack(
    folder: Annotated[str, typer.Argument(help="Folder or hub id of a packed model.")], out: Out, **options
) -> None:
    """Write the model that was packed, with the same bytes."""
    with terminal_progress(console) as progress:
        packing.unpack(folder, out, progress=progress, **options)
    typer.echo(f"written: {out}")
