"""The quality tables as Markdown, between markers of the README and of docs/gated.md."""

from collections.abc import Callable
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.machine import ROOT
from benchmarks.quality_results import Results, mean_and_std

METHODS = ("magnitude", "wanda", "connect", "gated", "sparsegpt", "wanda+obs")
PATTERNS = ("0.5", "0.6", "4:8", "2:4")
SIZES = (1, 4, 16, 64)
SIZE = 16  # calibration windows of the methods table
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"


def write(
    every: list[Results], readme: Path = ROOT / "README.md", gated: Path = ROOT / "docs/gated.md"
) -> None:
    """Replace what stands between the markers."""
    _replace(readme, "quality", "\n\n".join(_section(results, methods_table) for results in every))
    _replace(readme, "sizes", "\n\n".join(_section(results, sizes_table) for results in every))
    _replace(gated, "quality", "\n\n".join(_section(results, gated_table) for results in every))


def methods_table(results: Results) -> str:
    """Method x pattern: perplexity mean (std) over seeds, seconds, peak memory."""
    rows = []
    for method in METHODS:
        for pattern in PATTERNS:
            found = results.perplexities(method, pattern, SIZE)
            if not found:
                continue
            cost = results.cost(method, pattern)
            spent = (f"{cost.seconds:.1f} s", f"{cost.peak_bytes / 2**20:.0f} MiB") if cost else ("-", "-")
            rows.append((method, pattern, mean_and_std(found), str(len(found)), *spent))
    return tables.markdown(("method", "pattern", "perplexity", "seeds", "whole job", "peak memory"), rows)


def sizes_table(results: Results) -> str:
    """Calibration windows x method: Wanda-CoNNect's own comparison, on the seeds that both have."""
    return _by_size(results, ("wanda", "connect"), ("4:8", "2:4"))


def gated_table(results: Results) -> str:
    """Calibration windows x method, on the seeds that all have, and in how many gated is the best."""
    return _by_size(results, ("wanda", "connect", "gated"), PATTERNS, wins=True)


def _by_size(results: Results, methods: tuple, patterns: tuple, wins: bool = False) -> str:
    rows = []
    for pattern in patterns:
        for size in SIZES:
            found = {method: results.perplexities(method, pattern, size) for method in methods}
            if not all(found.values()):
                continue
            seeds = set.intersection(*(set(perplexities) for perplexities in found.values()))
            found = {m: {s: p for s, p in of.items() if s in seeds} for m, of in found.items()}
            row = [pattern, str(size), *(mean_and_std(of) for of in found.values()), str(len(seeds))]
            if wins:
                best = [min(found, key=lambda method, s=seed: found[method][s]) for seed in seeds]
                row.append(str(best.count(methods[-1])))
            rows.append(tuple(row))
    if not rows:
        return "Not measured yet."
    columns = (
        "pattern",
        "calibration windows",
        *methods,
        "seeds",
        *([f"{methods[-1]} wins"] if wins else []),
    )
    return tables.markdown(columns, rows)


def _section(results: Results, table: Callable[[Results], str]) -> str:
    about = f"**{results.label}**, dense {results.dense:.2f}; {results.protocol}."
    if table is methods_table and results.machine:
        about += f" Seconds and memory: {machine.sentence(results.machine)}"
    return f"{about}\n\n{table(results)}"


def _replace(page: Path, name: str, text: str) -> None:
    begin, end = BEGIN.format(name), END.format(name)
    content = page.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"{page} needs the lines {begin} and {end}, once each")
    before, rest = content.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
