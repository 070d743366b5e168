"""What a page says of a run in words and numbers: key figures, settings, how several runs differ."""

from dataclasses import dataclass, fields
from pathlib import PurePath

from wanda_fast.options.all_options import Options
from wanda_fast.report.charts import method_and_pattern, spread
from wanda_fast.report.measures import phase_seconds
from wanda_fast.report.weights import by_block

MIB = 2**20
DEFAULTS = {each.name: each.default for each in fields(Options)}
# Options that name files and folders of the run; two runs always differ in them.
OUTPUTS = ("save", "save_model", "save_packed", "save_log", "save_mask", "report", "overwrite", "resume")


@dataclass
class Tile:
    """A key figure, with a line of explanation."""

    name: str
    figure: str
    note: str


def model_name(content: dict) -> str:
    """The last part of a path or hub id."""
    return PurePath(str(content["recipe"]["model"])).name or str(content["recipe"]["model"])


def headline(content: dict) -> str:
    if not content["linears"]:
        return f"{model_name(content)}, measured"
    return f"{model_name(content)}, {content['sparsity']:.0%} pruned by {method_and_pattern(content)}"


def tiles(run: dict) -> list[Tile]:
    """The key figures of a run, the most important first."""
    content = run["content"]
    found = [_sparsity(run)] if content["linears"] else []
    return [*found, *_quality(content), *_error(run), *_packed(content), *_cost(content)]


def _sparsity(run: dict) -> Tile:
    content, blocks = run["content"], by_block(run["weights"], "sparsity", weighted=True)
    known = [value for value in blocks if value is not None]
    note = f"{min(known):.2%} to {max(known):.2%} in a block" if spread(blocks) >= 1e-4 else "in every block"
    return Tile("Sparsity", f"{content['sparsity']:.2%}", note)


def _quality(content: dict) -> list[Tile]:
    found, top = content["perplexity"], content["accuracy"]
    dense, pruned, tiles = found.get("dense"), found.get("pruned"), []
    if pruned is not None:
        note = "" if not dense else f"dense {dense:,.2f}, × {pruned / dense:.2f}"
        tiles.append(Tile("Perplexity", f"{pruned:,.2f}", note))
    elif dense is not None:
        tiles.append(Tile("Perplexity", f"{dense:,.2f}", "dense"))
    if found.get("kl") is not None:
        tiles.append(Tile("KL divergence", f"{found['kl']:.4f}", "nats per token, to the dense model"))
    if found.get("flips") is not None:
        tiles.append(Tile("Flips", f"{found['flips']:.1%}", "tokens whose first choice changed"))
    if last := top.get("pruned") or top.get("dense"):
        note = f"dense {top['dense']['top1']:.2%}" if "pruned" in top and "dense" in top else "dense"
        tiles.append(Tile("Top-1 accuracy", f"{last['top1']:.2%}", note))
    return tiles


def _error(run: dict) -> list[Tile]:
    errors = run["weights"]["values"].get("relative_error", [])
    known = [error for error in errors if error is not None]
    return (
        [Tile("Relative error", f"{sum(known) / len(known):.4f}", "mean of ‖(W − W′)X‖² / ‖WX‖²")]
        if known
        else []
    )


def _packed(content: dict) -> list[Tile]:
    if not (sizes := content.get("packed")):
        return []
    return [Tile("Packed", f"{sizes['after'] / MIB:,.0f} MiB", f"dense {sizes['before'] / MIB:,.0f} MiB")]


def _cost(content: dict) -> list[Tile]:
    seconds = phase_seconds(content)
    longest = max(seconds, key=seconds.get, default="")
    tiles = (
        [Tile("Time", _duration(sum(content["seconds"].values())), f"longest: {longest}")] if seconds else []
    )
    for device, peak in content["peak_memory"].items():
        tiles.append(Tile("Peak memory", f"{peak / MIB:,.0f} MiB", device))
    return tiles


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def settings(content: dict) -> list[tuple[str, str]]:
    """What was pruned and how, by name: the options that matter always, and those that were set."""
    recipe, reach, shape = content["recipe"], content["reach"] or {}, content["calibration"].get("shape")
    rows = [("model", recipe["model"]), ("method", recipe["prune_method"])]
    if content["linears"]:
        weights = sum(linear["weights"] for linear in content["linears"].values())
        rows.append(("pattern", f"{recipe['sparsity_type']}, ratio {recipe['sparsity_ratio']:g}"))
        rows.append(("pruned", f"{len(content['linears']):,} linears, {weights:,} weights"))
    if reach.get("model"):
        share = reach["prunable"] / reach["model"]
        rows.append(("in reach", f"{reach['prunable']:,} of {reach['model']:,} weights ({share:.1%})"))
    if shape:
        kind = f"{shape[0]:,} × {shape[1]:,} tokens" if len(shape) == 2 else " × ".join(map(str, shape))
        rows.append(("calibration", f"{recipe['dataset']}, {kind}"))
    rows += [("measured on", found["protocol"]) for found in _protocols(content)]
    told = {"model", "prune_method", "sparsity_type", "sparsity_ratio", "dataset", "nsamples", "seqlen"}
    told |= {"eval_dataset", "eval_windows"}
    others = [name for name, value in recipe.items() if name not in told and _is_set(name, value)]
    rows += [(name, _said(recipe[name])) for name in others]
    return [(name, str(value)) for name, value in rows]


def _protocols(content: dict) -> list[dict]:
    return [found for found in (content["perplexity"], content["accuracy"]) if found.get("protocol")]


def _is_set(name: str, value: object) -> bool:
    default = DEFAULTS.get(name)
    return value != (list(default) if isinstance(default, tuple) else default)


def _said(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "default" if value is None else str(value)


def how_it_ran(content: dict) -> list[tuple[str, str]]:
    """Resources and backends, by name."""
    resources, rows = content["resources"], []
    if "batch_size" in resources:
        rows.append(("batch size", str(resources["batch_size"])))
    if "activations" in resources:
        rows.append(("hidden states on", f"{resources['activations']} ({resources.get('why', '')})"))
    used = {}
    for linear in content["linears"].values():
        used[linear["operation"]] = linear["backend"]
        used[linear["statistic"]] = linear["statistic_backend"]
        used |= linear["further"]
    rows += [(str(operation), str(backend)) for operation, backend in used.items() if operation]
    return rows


def differing(contents: list[dict]) -> list[tuple[str, list[str]]]:
    """The options in which runs differ, except their outputs, each with its value in every run."""
    names = [name for name in DEFAULTS if name not in OUTPUTS]
    values = {name: [_said(content["recipe"].get(name)) for content in contents] for name in names}
    return [(name, found) for name, found in values.items() if len(set(found)) > 1]


def overview(runs: list[dict]) -> list[dict[str, str]]:
    """One row a run: its label, what was done, and its key figures by name."""
    models = [model_name(run["content"]) for run in runs]
    rows = []
    for run, model in zip(runs, models, strict=True):
        dense = run["content"]["perplexity"].get("dense")
        row = {"run": run["label"], "model": model if len(set(models)) > 1 else ""}
        row |= {"method": method_and_pattern(run["content"])}
        row |= {tile.name.lower(): tile.figure for tile in tiles(run)}
        rows.append(row | {"dense perplexity": "" if dense is None else f"{dense:,.2f}"})
    return rows


def overview_names(rows: list[dict[str, str]]) -> list[str]:
    """The columns of `overview`, except figures that no run has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(row.get(name) for row in rows)]


def digests(content: dict) -> list[tuple[str, str]]:
    return [(name, digest) for name, digest in content["digests"].items() if digest]


def rank_rows(content: dict) -> list[tuple[str, list[str]]]:
    """Rank and host -> seconds, those in collectives, MiB at the peak, MiB moved."""
    return [
        (
            f"{at}, {rank['host']}",
            [
                f"{sum(rank['seconds'].values()):.1f}",
                f"{rank['seconds'].get('collectives', 0.0):.1f}",
                f"{max(rank['peak_memory'].values(), default=0) / MIB:,.0f}",
                f"{rank['moved'] / MIB:,.0f}",
            ],
        )
        for at, rank in enumerate(content.get("ranks") or ())
    ]


def title(runs: list[dict]) -> str:
    """The headline of one run; of several, how many there are of which models."""
    if len(runs) == 1:
        return headline(runs[0]["content"])
    models = ", ".join(dict.fromkeys(model_name(run["content"]) for run in runs))
    return f"{len(runs)} runs of {models}"
