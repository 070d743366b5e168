"""The commands that write a page: on one run, or on several side by side."""

from pathlib import Path
from typing import Annotated

import typer

from wanda_fast.options.all_options import at_home
from wanda_fast.output import pages

Output = Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Allow a file that exists.")]


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run (with wanda_fast.json).")],
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a page on a finished run: FOLDER/report.html, or the file that -o names."""
    folder = at_home(folder)
    inside = folder if folder.is_dir() else folder.parent
    _write({"": pages.read_report(folder)}, at_home(output) or inside / "report.html", overwrite)


def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs, or of sweeps.", metavar="FOLDER...")
    ],
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a page that shows several runs side by side: compare.html, or the file that -o names."""
    runs = pages.named_reports([at_home(folder) for folder in folders])
    _write(runs, at_home(output) or Path("compare.html"), overwrite)


def _write(contents: dict[str, dict], file: Path, overwrite: bool) -> None:
    pages.require_page(file, overwrite)
    pages.write_page(contents, file)
    typer.echo(f"written: {file}")
