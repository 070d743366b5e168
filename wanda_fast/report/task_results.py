"""Results of tasks in words."""

STDERR = "_stderr"


def in_words(metrics: dict[str, float]) -> str:
    """`0.5123 +- 0.0103`: the accuracy and its standard error; then any other metric with its name."""
    names = [name for name in metrics if name != "items" and STDERR not in name]
    first, *others = sorted(names, key=lambda name: name != "acc") or [""]
    if not first:
        return "not measured"
    words = _value(metrics, first) if first == "acc" else f"{first} {_value(metrics, first)}"
    further = ", ".join(f"{name} {_value(metrics, name)}" for name in others)
    return f"{words} ({further})" if further else words


def beside(results: dict[str, dict[str, float]]) -> str:
    """The results of one task, of the dense model and of the pruned one."""
    return "; ".join(f"{which} {in_words(metrics)}" for which, metrics in results.items())


def _value(metrics: dict[str, float], name: str) -> str:
    metric, comma, variant = name.partition(",")
    error = metrics.get(f"{metric}{STDERR}{comma}{variant}")
    return f"{metrics[name]:.4f}" + ("" if error is None else f" +- {error:.4f}")
