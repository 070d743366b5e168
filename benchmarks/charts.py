"""The two pictures of the README as SVG text, from the results."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.core import machine
from benchmarks.jobs import model_table
from benchmarks.quality.results import Results

WIDTH = 700
GREY, BLUE, INK, PALE = "#9aa0a6", "#1a6fc4", "#202124", "#dadce0"
METHODS = ("wanda", "connect", "sparsegpt")
LINES = {
    "magnitude": "#9aa0a6",
    "wanda": "#1a6fc4",
    "connect": "#e8710a",
    "gated": "#188038",
    "sparsegpt": "#a142f4",
}
MODELS = {"llama2-7b": "Llama-2-7B's shape", "SmolLM2-135M-Instruct": "SmolLM2-135M"}
DENSE_MODEL, SIZE = "SmolLM2-135M-Instruct", 16
RATIOS = ("0.3", "0.4", "0.5", "0.6", "0.7")
TOP = 2000  # perplexities above are of a broken model and leave the picture


def speed(folder: Path) -> str:
    """Bars: seconds of whole jobs, the published code and wanda_fast."""
    parts, y = [_text(16, 28, "Seconds to prune a whole model to 2:4 (shorter is better)", 16, "bold")], 62
    parts += [_rect(16, 42, 12, 12, GREY), _text(34, 53, "published code"), _rect(150, 42, 12, 12, BLUE)]
    parts += [_text(168, 53, "wanda_fast --sequential block, the published order")]
    for device in ("cuda", "cpu"):
        for report in _complete(folder, device)[:1]:
            bars, height = _group(report, y)
            parts, y = parts + bars, y + height
    return _svg(parts, y + 4)


def _complete(folder: Path, device: str) -> list[dict]:
    """Reports at 2:4 in which every method was timed both ways, newest first."""
    found = model_table.newest(folder, device)
    found = [report for report in found if report["workload"]["sparsity_type"] == "2:4"]
    return [report for report in found if _seconds(report).keys() >= set(METHODS)]


def _seconds(report: dict) -> dict[str, tuple[float, float]]:
    """By method, seconds of the published code and of ours, in the dtype that was measured last."""
    found: dict[str, dict[str, float]] = {}
    dtype = report["runs"][-1]["dtype"]
    for row in model_table.rows(report):
        if row["dtype"] == dtype and row["sequential"] == "block" and row["agreement"] is not False:
            found.setdefault(row["method"], {})[row["pipeline"]] = row["wall_s"]
    return {name: (of["published"], of["wanda_fast"]) for name, of in found.items() if len(of) == 2}


def _group(report: dict, y: int) -> tuple[list[str], int]:
    work, times = report["workload"], _seconds(report)
    where = f"{MODELS.get(work['model'], work['model'])}, {work['nsamples']} x {work['seqlen']} tokens, "
    where += f"{report['runs'][-1]['dtype']}, {machine.name(report['machine'])}"
    parts, top = [_text(16, y + 22, where, 13, "bold")], y + 34
    scale = 440 / max(published for published, _ in times.values())
    for index, method in enumerate(METHODS):
        published, ours = times[method]
        line = top + 40 * index
        parts.append(_text(104, line + 19, method, 13, anchor="end"))
        parts.append(_rect(112, line, published * scale, 13, GREY))
        parts.append(_text(118 + published * scale, line + 11, f"{published:.0f} s", 12))
        parts.append(_rect(112, line + 14, ours * scale, 13, BLUE))
        label = f"{ours:.0f} s, {published / ours:.1f} times as fast"
        parts.append(_text(118 + ours * scale, line + 25, label, 12, "bold"))
    end = top + 40 * len(METHODS)
    if work["published_blocks"] < work["blocks"]:
        blocks = f"{work['published_blocks']} of {work['blocks']} blocks"
        note = f"The published code ran on {blocks}; its time is scaled to all."
        parts.append(_text(112, end + 4, note, 11))
        end += 14
    return parts, end - y


def quality(every: list[Results]) -> str:
    """Lines: perplexity against sparsity, at the ratios that were measured for every method."""
    found = next(results for results in every if results.label == DENSE_MODEL)
    cells = {(method, ratio): found.perplexities(method, ratio, SIZE) for method in LINES for ratio in RATIOS}
    cells = {case: list(of_seeds.values()) for case, of_seeds in cells.items() if of_seeds}
    ratios = [ratio for ratio in RATIOS if all((method, ratio) in cells for method in LINES)]
    first, last = float(ratios[0]), float(ratios[-1])
    left, right, top, bottom = 64, 560, 72, 402
    low, high = math.log(found.dense * 0.9), math.log(TOP)

    def at(ratio: float, perplexity: float) -> tuple[float, float]:
        x = left + (right - left) * (ratio - first) / (last - first)
        return x, bottom - (bottom - top) * (math.log(perplexity) - low) / (high - low)

    seeds = sorted({len(of_seeds) for of_seeds in cells.values()})
    about = f"{MODELS[DENSE_MODEL]}, WikiText-2 test, {SIZE} calibration windows of 512 tokens, "
    about += f"mean over {seeds[0]} to {seeds[-1]} seeds"
    parts = [_text(16, 28, "Perplexity against unstructured sparsity (lower is better)", 16, "bold")]
    parts.append(_text(16, 46, about, 12))
    for value in (50, 100, 200, 500, 1000, 2000):
        y = at(first, value)[1]
        parts.append(_line([(left, y), (right, y)], PALE, 1))
        parts.append(_text(left - 8, y + 4, f"{value:,}", 12, anchor="end"))
    for ratio in map(float, ratios):
        parts.append(_text(at(ratio, TOP)[0], bottom + 20, f"{ratio:.0%}", 12, anchor="middle"))
    dense = at(first, found.dense)[1]
    parts.append(_line([(left, dense), (right, dense)], INK, 1, dashed=True))
    frame = _rect(left - 4, top, right - left + 8, bottom - top, "none")
    parts.append(f'<clipPath id="frame">{frame}</clipPath>')
    ends = {f"dense {found.dense:.1f}": (dense, INK)}
    for method, colour in LINES.items():
        means = [(float(r), statistics.mean(cells[method, r])) for r in ratios]
        points = [at(*each) for each in means]
        parts.append(f'<g clip-path="url(#frame)">{_line(points, colour, 2.5)}{_dots(points, colour)}</g>')
        if points[-1][1] >= top:
            ends[f"{method} {means[-1][1]:,.0f}"] = points[-1][1], colour
        else:
            x, y = next((x, y) for x, y in reversed(points) if y >= top)
            label = f"{method} ({means[-1][1]:,.0f} at {means[-1][0]:.0%})"
            parts.append(_text(x + 14, y + 5, label, 13, "bold", fill=colour))
    previous = math.inf
    for label, (y, colour) in sorted(ends.items(), key=lambda end: -end[1][0]):
        previous = min(y, previous - 16)
        parts.append(_text(right + 10, previous + 4, label, 13, "bold", fill=colour))
    return _svg(parts, bottom + 32)


def _svg(parts: Iterable[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif">'
    return "\n".join([head, _rect(0, 0, WIDTH, height, "white"), *parts, "</svg>"]) + "\n"


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'


def _text(x, y, text: str, size=13, weight="normal", anchor="start", fill=INK) -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{text}</text>'


def _line(points: Iterable[tuple[float, float]], colour: str, width: float, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'


def _dots(points: Iterable[tuple[float, float]], colour: str) -> str:
    return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points)
