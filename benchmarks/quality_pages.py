"""The quality tables as Markdown, between markers of the README and of pages in docs/."""

from collections.abc import Callable
from pathlib import Path

from benchmarks import machine, pages, tables
from benchmarks.machine import ROOT
from benchmarks.quality_results import Results, mean_and_std

METHODS = ("magnitude", "wanda", "connect", "gated", "sparsegpt", "wanda+obs")
PATTERNS = ("0.5", "0.6", "4:8", "2:4")
SIZES = (1, 4, 16, 64)
SIZE = 16  # calibration windows of the methods table


def write(every: list[Results], root: Path = ROOT) -> None:
    """Replace what stands between the markers; `root`: the folder of README.md and docs/.

    The README shows models whose jobs were timed.
    """
    timed = [results for results in every if results.machine]
    for page, shown, sections in (
        ("README.md", timed, {"quality": methods_table, "sizes": sizes_table}),
        ("docs/quality.md", every, {"quality": methods_table, "sizes": sizes_table}),
        ("docs/gated.md", every, {"quality": gated_table}),
    ):
        for name, table in sections.items():
            text = "\n\n".join(_section(results, table) for results in shown)
            pages.replace_section(root / page, name, text)


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
