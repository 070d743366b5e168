"""Pages that are written by hand but for what stands between two comments."""

from pathlib import Path

import typer

from benchmarks.tables import replace_file


def replace_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between the page's two comments of that name; raises `typer.BadParameter`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = page.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(end) < content.index(begin):
        raise typer.BadParameter(f"{page} needs the lines {begin} and {end}, once each and in this order")
    before, rest = content.split(begin)
    replace_file(page, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
