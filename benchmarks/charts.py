"""The pictures of README and docs, drawn by matplotlib from the results.

A picture holds the data that it shows in its description, so that a test without matplotlib can compare it
with the results.
"""

import json
import statistics
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.core import machine
from benchmarks.jobs import model_table
from benchmarks.quality.results import Results

GREY, BLUE = "#9aa0a6", "#1a6fc4"
METHODS = ("wanda", "connect", "sparsegpt")
LINES = {"magnitude": GREY, "wanda": BLUE, "connect": "#e8710a", "gated": "#188038", "sparsegpt": "#a142f4"}
ADMM = {"admm": "#d01884"}  # measured on the model in float32
MODELS = {"llama2-7b": "Llama-2-7B's shape", "SmolLM2-135M-Instruct": "SmolLM2-135M"}
DENSE_MODEL, SIZE = "SmolLM2-135M-Instruct", 16
FRONTIER_MODEL, FRONTIER_PATTERN = "SmolLM2-135M-Instruct-float32", "2:4"
RATIOS = ("0.3", "0.4", "0.5", "0.6", "0.7")
# A perplexity above this is of a broken model; the line leaves the picture.
HIGHEST = 2000


def speed_data(folder: Path) -> list[dict]:
    """Seconds of whole jobs at 2:4 by method, the published code's and ours: a GPU's first, then a CPU's."""
    return [_job(report) for device in ("cuda", "cpu") for report in _complete(folder, device)[:1]]


def quality_data(every: list[Results]) -> dict:
    """The perplexity of the dense model, and of each method by unstructured sparsity: means over seeds."""
    found = next(results for results in every if results.label == DENSE_MODEL)
    of = dict.fromkeys(LINES, found)
    in_fp32 = [results for results in every if results.label == FRONTIER_MODEL]
    of |= dict.fromkeys(ADMM if in_fp32 else (), *in_fp32)
    cells = {
        (method, ratio): of[method].perplexities(method, ratio, SIZE) for method in of for ratio in RATIOS
    }
    means = {case: statistics.mean(seeds.values()) for case, seeds in cells.items() if seeds}
    counts = [len(seeds) for seeds in cells.values() if seeds]
    lines = {
        method: [
            [float(ratio), round(means[method, ratio], 3)] for ratio in RATIOS if (method, ratio) in means
        ]
        for method in of
    }
    about = f"{MODELS[DENSE_MODEL]}, WikiText-2 test, {SIZE} calibration windows of 512 tokens, "
    about += f"mean over {min(counts)} to {max(counts)} seeds; admm: float32"
    return {"about": about, "dense": round(found.dense, 3), "lines": lines}


def frontier_data(every: list[Results]) -> dict:
    """By method, [seconds of the whole job, mean perplexity], of those that have both."""
    found = next(results for results in every if results.label == FRONTIER_MODEL)
    points, seeds = {}, []
    for cost in found.costs:
        perplexities = found.perplexities(cost.method, cost.pattern, cost.nsamples)
        if cost.pattern == FRONTIER_PATTERN and perplexities:
            points[cost.method] = [round(cost.seconds, 1), round(statistics.mean(perplexities.values()), 2)]
            seeds.append(len(perplexities))
    about = f"SmolLM2-135M, {FRONTIER_PATTERN}, {SIZE} x 512 tokens, {min(seeds)} to {max(seeds)} seeds; "
    return {"about": about + machine.name(found.machine), "points": points}


def data_of(picture: Path) -> object:
    """The data that a picture shows."""
    description = ElementTree.parse(picture).find(".//{http://purl.org/dc/elements/1.1/}description")
    return json.loads(description.text)


def draw_speed(groups: list[dict], file: Path) -> None:
    """Two bars for each method, a panel for each group."""
    plt = _pyplot()
    heights = [len(group["seconds"]) for group in groups]
    figure, panels = plt.subplots(len(groups), figsize=(7, 4.6), squeeze=False, height_ratios=heights)
    figure.suptitle(
        "Seconds to prune a whole model to 2:4 (shorter is better)", x=0.02, ha="left", weight="bold"
    )
    for panel, group in zip(panels[:, 0], groups, strict=True):
        longest = max(published for published, _ in group["seconds"].values())
        for place, (published, ours) in enumerate(group["seconds"].values()):
            panel.barh(
                place - 0.19, published, 0.36, color=GREY, label="published code" if not place else None
            )
            panel.barh(place + 0.19, ours, 0.36, color=BLUE, label="wanda_fast" if not place else None)
            panel.text(published + longest / 90, place - 0.19, f"{published:.0f} s", va="center", size=9)
            label = f"{ours:.0f} s, {published / ours:.1f} times as fast"
            panel.text(ours + longest / 90, place + 0.19, label, va="center", size=9, weight="bold")
        panel.set_yticks(range(len(group["seconds"])), group["seconds"], size=10)
        panel.set_title(group["title"], loc="left", size=10, weight="bold")
        panel.set_xlim(0, longest * 1.1)
        panel.set_xlabel(group["note"], loc="left", size=8)
        panel.invert_yaxis()
        panel.tick_params(length=0, labelbottom=False)
        panel.spines[:].set_visible(False)
    panels[0, 0].legend(frameon=False, loc="center right", fontsize=10)
    _save(figure, groups, file)


def draw_quality(data: dict, file: Path) -> None:
    """A line for each method, named at its end."""
    figure, panel = _pyplot().subplots(figsize=(7, 4.4))
    panel.set_title("Perplexity against unstructured sparsity (lower is better)\n", loc="left", weight="bold")
    panel.text(0, 1.03, data["about"], transform=panel.transAxes, size=9)
    last = max(points[-1][0] for points in data["lines"].values())
    ends = [(data["dense"], f"dense {data['dense']:.1f}", "#202124")]
    for method, points in data["lines"].items():
        panel.plot(*zip(*points, strict=True), color=(LINES | ADMM)[method], marker="o", markersize=4)
        inside = [point for point in points if point[1] <= HIGHEST]
        if inside == points:
            ends.append((points[-1][1], f"{method} {points[-1][1]:,.0f}", (LINES | ADMM)[method]))
        else:
            label = f"{method} ({points[-1][1]:,.0f} at {points[-1][0]:.0%})"
            _name(panel, inside[-1], label, (LINES | ADMM)[method])
    panel.axhline(data["dense"], color="#202124", linestyle="--", linewidth=1)
    panel.set_yscale("log")
    panel.set_ylim(data["dense"] * 0.9, HIGHEST)
    panel.set_yticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1,000", "2,000"])
    panel.minorticks_off()
    panel.xaxis.set_major_formatter("{x:.0%}")
    panel.set_xticks(sorted({ratio for points in data["lines"].values() for ratio, _ in points}))
    panel.grid(axis="y", color="#dadce0")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    lowest = 0.0
    for perplexity, label, colour in sorted(ends):
        lowest = max(perplexity, lowest * 1.16)
        _name(panel, (last, lowest), label, colour)
    _save(figure, data, file)


def draw_frontier(data: dict, file: Path) -> None:
    """A point for each method."""
    figure, panel = _pyplot().subplots(figsize=(7, 3.6))
    panel.set_title(
        "Perplexity against seconds of the whole job (lower left is better)\n", loc="left", weight="bold"
    )
    panel.text(0, 1.03, data["about"], transform=panel.transAxes, size=9)
    for method, (seconds, perplexity) in data["points"].items():
        colour = (LINES | ADMM)[method.split("@")[0]]
        panel.plot(seconds, perplexity, marker="o", color=colour)
        _name(
            panel,
            (seconds, perplexity),
            f"{method.replace('@', ' --').replace('=', ' ')}: {perplexity:.0f}",
            colour,
        )
    panel.set_xlabel("seconds", loc="left", size=9)
    panel.set_xlim(0, 1.5 * max(seconds for seconds, _ in data["points"].values()))
    panel.set_ylim(0, 1.1 * max(perplexity for _, perplexity in data["points"].values()))
    panel.grid(axis="y", color="#dadce0")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    _save(figure, data, file)


def _name(panel, point: tuple[float, float], label: str, colour: str) -> None:
    """Write the label to the right of a point."""
    place = dict(xytext=(9, 0), textcoords="offset points", va="center")
    panel.annotate(label, point, color=colour, weight="bold", **place)


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


def _job(report: dict) -> dict:
    work, times = report["workload"], _seconds(report)
    title = f"{MODELS.get(work['model'], work['model'])}, {work['nsamples']} x {work['seqlen']} tokens, "
    title += f"{report['runs'][-1]['dtype']}, {machine.name(report['machine'])}"
    scaled = work["published_blocks"] < work["blocks"]
    blocks = f"{work['published_blocks']} of {work['blocks']} blocks"
    note = f"The published code ran on {blocks}; its time is scaled."
    seconds = {method: [round(each, 3) for each in times[method]] for method in METHODS}
    return {"title": title, "note": note if scaled else "", "seconds": seconds}


def _pyplot():
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and the same data give the same bytes.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "wanda_fast", "font.family": "sans-serif"}
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure, data: object, file: Path) -> None:
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Description": json.dumps(data)}
    figure.savefig(file, format="svg", metadata=metadata, bbox_inches="tight", facecolor="white")
