"""The charts of a page, as data that its script draws. A chart without data is left out."""

from math import isfinite

from wanda_fast.report.measures import accuracies, phase_seconds
from wanda_fast.report.weights import by_block

MIB = 2**20
# Phases with a bar of their own; the others, the shortest, share one.
MOST_PHASES = 7
# Blocks whose sparsities differ by less have the same one, but for whole numbers of weights in a row.
EVEN = 5e-3
# Charts by sparsity: key in `perplexity`, title, unit.
BY_SPARSITY = (
    ("pruned", "Perplexity by sparsity", "perplexity"),
    ("kl", "Distance to the dense model by sparsity", "KL divergence, nats per token"),
    ("flips", "Changed first choices by sparsity", "share of tokens"),
)


def charts(runs: list[dict]) -> list[dict]:
    """The charts of these runs.

    Each has id, title, form, the axes' titles and series of label and values. Its form is "points" (values
    are {x, y, run}), "lines", "bars", "bars across" or "stacked bars across" (one value, or None, for each of
    `labels`).

    Args:
        runs: each with `label`, `content` (the report) and `weights` (its columns).
    """
    found = [_by_sparsity(runs, *what) for what in BY_SPARSITY]
    found += [
        _by_block(runs, "relative_error", "Error by block", "relative error, mean of a block"),
        _output_error(runs),
        _by_block(runs, "sparsity", "Sparsity by block", "fraction of zeros"),
        _tasks(runs),
        _seconds(runs),
        _memory(runs),
    ]
    return [chart for chart in found if any(_has_value(series) for series in chart["series"])]


def _chart(
    id: str, title: str, form: str, x: str, y: str, series: list[dict], labels: list[str] | None = None
) -> dict:
    return {"id": id, "title": title, "form": form, "x": x, "y": y, "series": series, "labels": labels}


def _has_value(series: dict) -> bool:
    return any(value is not None for value in series["values"])


def _by_sparsity(runs: list[dict], key: str, title: str, unit: str) -> dict:
    """A line for each method and pattern; no series for fewer than two runs."""
    lines: dict[str, list[dict]] = {}
    for run in runs:
        content, value = run["content"], _number(run["content"]["perplexity"].get(key))
        if value is not None:
            point = {"x": round(100 * content["sparsity"], 3), "y": value, "run": run["label"]}
            lines.setdefault(method_and_pattern(content), []).append(point)
    series = [{"label": name, "values": sorted(line, key=lambda p: p["x"])} for name, line in lines.items()]
    if sum(map(len, lines.values())) < 2:
        series = []
    elif key == "pruned":
        measured = {_number(run["content"]["perplexity"].get("dense")) for run in runs} - {None}
        dense = [{"x": 0, "y": value, "run": "dense"} for value in sorted(measured)]
        series.append({"label": "dense", "values": dense})
    return _chart(key, title, "points", "sparsity, %", unit, series)


def method_and_pattern(content: dict) -> str:
    """`wanda, 2:4`, or `wanda` for an unstructured pattern."""
    pattern = content["recipe"]["sparsity_type"]
    return content["recipe"]["prune_method"] + ("" if pattern == "unstructured" else f", {pattern}")


def _by_block(runs: list[dict], attribute: str, title: str, unit: str) -> dict:
    """A line for each run. No series for a sparsity that is the same in all blocks of a run, in all runs."""
    sparsity = attribute == "sparsity"
    series = [
        {"label": run["label"], "values": by_block(run["weights"], attribute, weighted=sparsity)}
        for run in runs
    ]
    series = list(filter(_has_value, series))
    if sparsity and all(spread(line["values"]) < EVEN for line in series):
        series = []
    labels = max((run["weights"]["labels"] for run in runs), key=len)
    return _chart(attribute, title, "lines", "block", unit, series, labels)


def spread(values: list[float | None]) -> float:
    """The difference of the largest and the smallest value."""
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else 0.0


def _output_error(runs: list[dict]) -> dict:
    """The error of what a block hands to the next one, in runs that measured it."""
    errors = {run["label"]: run["content"].get("block_output_error") or {} for run in runs}
    whole = max((run["weights"] for run in runs), key=lambda weights: len(weights["blocks"]))
    # A resumed run has those of its last blocks alone.
    series = [
        {"label": name, "values": [_number(of.get(block)) for block in whole["blocks"]]}
        for name, of in errors.items()
        if of
    ]
    unit = "relative error of the hidden states"
    return _chart("output_error", "Error after each block", "lines", "block", unit, series, whole["labels"])


def _tasks(runs: list[dict]) -> dict:
    """Accuracy of the dense model, of the first run that measured it, beside each run's."""
    found = [(run["label"], accuracies(run["content"])) for run in runs]
    tasks = list(dict.fromkeys(task for _, of in found for task in of))
    dense = {task: of[task]["dense"] for _, of in reversed(found) for task in of if "dense" in of[task]}
    series = [{"label": "dense", "values": [_accuracy(dense.get(task)) for task in tasks]}]
    for label, of in found:
        values = [_accuracy(of.get(task, {}).get("pruned")) for task in tasks]
        series.append({"label": label if len(runs) > 1 else "pruned", "values": values})
    series = list(filter(_has_value, series))
    return _chart("tasks", "Accuracy by task", "bars", "", "accuracy", series, tasks)


def _accuracy(measured: dict | None) -> float | None:
    return _number(measured and measured["value"])


def _seconds(runs: list[dict]) -> dict:
    """A bar for each phase of one run, the longest first; a bar for each of several runs, cut into phases."""
    found = [phase_seconds(run["content"]) for run in runs]
    longest = {phase: max(of.get(phase, 0.0) for of in found) for of in found for phase in of}
    ordered = sorted(longest, key=longest.get, reverse=True)
    phases = {phase: [phase] for phase in ordered[:MOST_PHASES]}
    if others := ordered[MOST_PHASES:]:
        phases[f"{len(others)} others"] = others
    by_phase = {name: [_summed(of, parts) for of in found] for name, parts in phases.items()}
    if len(runs) == 1:
        series = [{"label": "seconds", "values": [value for (value,) in by_phase.values()]}]
        return _chart("seconds", "Time by phase", "bars across", "seconds", "", series, list(by_phase))
    series = [{"label": name, "values": values} for name, values in by_phase.items()]
    labels = [run["label"] for run in runs]
    return _chart("seconds", "Time by phase", "stacked bars across", "seconds", "", series, labels)


def _summed(seconds: dict[str, float], phases: list[str]) -> float:
    return round(sum(seconds.get(phase, 0.0) for phase in phases), 3)


def _memory(runs: list[dict]) -> dict:
    """Bars of prediction and peak for each run and device."""
    found = [(run["content"]["predicted_memory"], run["content"]["peak_memory"]) for run in runs]
    devices = sorted({device for sizes in found for of in sizes for device in of})
    labels, values = [], []
    for run, (predicted, peak) in zip(runs, found, strict=True):
        for device in (device for device in devices if device in predicted or device in peak):
            names = [run["label"]] * (len(runs) > 1) + [device] * (len(devices) > 1 or len(runs) == 1)
            labels.append(", ".join(names))
            values.append((_mib(predicted.get(device)), _mib(peak.get(device))))
    names = ("predicted, above Python and torch", "peak of the process")
    series = [{"label": name, "values": [pair[at] for pair in values]} for at, name in enumerate(names)]
    series = list(filter(_has_value, series))
    return _chart("memory", "Memory against prediction", "bars across", "MiB", "", series, labels)


def _mib(size: int | None) -> float | None:
    return None if size is None else round(size / MIB, 1)


def _number(value: object) -> float | None:
    """A finite number; JSON has no other ones."""
    return value if isinstance(value, int | float) and isfinite(value) else None
