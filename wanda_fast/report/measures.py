"""What a run measured, in one form for tables and charts: quality against the dense model, seconds."""

from dataclasses import dataclass


@dataclass
class Measure:
    """One row of the table of quality. `note` says in which direction it is better, or its unit."""

    name: str
    note: str
    dense: str
    pruned: str
    change: str


def measures(content: dict) -> list[Measure]:
    """All that was measured of the model, perplexity first."""
    return [*_perplexity(content["perplexity"]), *_top(content["accuracy"]), *_tasks(content)]


def _perplexity(found: dict) -> list[Measure]:
    rows, dense, pruned = [], found.get("dense"), found.get("pruned")
    if dense is not None or pruned is not None:
        ratio = found.get("ratio") or (pruned / dense if dense and pruned is not None else None)
        change = "" if ratio is None else f"× {ratio:.3f}"
        rows.append(Measure("Perplexity", "lower is better", _figure(dense), _figure(pruned), change))
    if found.get("kl") is not None:
        note = "nats per token, from the dense model's next-token distributions"
        rows.append(Measure("KL divergence", note, "", f"{found['kl']:.4f}", ""))
    if found.get("flips") is not None:
        rows.append(Measure("Flips", "tokens whose first choice changed", "", f"{found['flips']:.2%}", ""))
    return rows


def _top(found: dict) -> list[Measure]:
    """Accuracy of an image classifier."""
    rows = []
    for key, name in (("top1", "Top-1 accuracy"), ("top5", "Top-5 accuracy")):
        dense, pruned = (found.get(which, {}).get(key) for which in ("dense", "pruned"))
        if dense is not None or pruned is not None:
            change = "" if None in (dense, pruned) else f"{100 * (pruned - dense):+.2f} points"
            rows.append(Measure(name, "higher is better", _share(dense), _share(pruned), change))
    return rows


def _tasks(content: dict) -> list[Measure]:
    rows, note = [], "accuracy ± standard error"
    for task, found in accuracies(content).items():
        dense, pruned = found.get("dense"), found.get("pruned")
        change = f"{100 * (pruned['value'] - dense['value']):+.2f} points" if dense and pruned else ""
        rows.append(Measure(task, note, _with_error(dense), _with_error(pruned), change))
    return rows


def accuracies(content: dict) -> dict[str, dict[str, dict]]:
    """Task -> "dense" or "pruned" -> value and error (its standard error, or None).

    Results without "dense" and "pruned", which are lm-evaluation-harness's own, are of the model at the end.
    """
    only = "pruned" if content["linears"] else "dense"
    found = {}
    for task, results in content["zero_shot"].items():
        by_model = results if {"dense", "pruned"} & results.keys() else {only: results}
        measured = {which: _accuracy(of) for which, of in by_model.items() if isinstance(of, dict)}
        found[task] = {which: of for which, of in measured.items() if of is not None}
    return {task: of for task, of in found.items() if of}


def _accuracy(results: dict) -> dict | None:
    """The accuracy of one model in one task. lm-evaluation-harness calls it "acc,none"."""
    plain = {name.partition(",")[0]: value for name, value in results.items()}
    if not isinstance(plain.get("acc"), int | float):
        return None
    error = plain.get("acc_stderr")
    return {"value": plain["acc"], "error": error if isinstance(error, int | float) else None}


def phase_seconds(content: dict) -> dict[str, float]:
    """Seconds by phase; of several ranks, the slowest one's."""
    ranks = content.get("ranks") or ()
    return {
        phase: max([own, *(rank["seconds"].get(phase, 0.0) for rank in ranks)])
        for phase, own in content["seconds"].items()
    }


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _with_error(found: dict | None) -> str:
    if not found:
        return ""
    error = "" if found["error"] is None else f" ± {found['error']:.2%}"
    return f"{found['value']:.2%}{error}"
