"""`python -m benchmarks.gpu_visit --publish VISIT.json ...`: what came back, into `benchmarks/results/`.

Several visits of one machine may be given: a part is taken from the last that has it, with that visit's
commit, and only that visit's tests vouch for it.
"""

import json
from pathlib import Path

from benchmarks import machine, model_table, roofline, tables
from benchmarks.roofs import Roofs
from benchmarks.visit import page
from benchmarks.visit.state import trusted


class PublishError(ValueError):
    """Why visits cannot be published, in one sentence."""


def publish(paths: list[Path], results: Path) -> Path:
    """The folder DATE-MACHINE that `benchmarks.readme` reads; raises `PublishError`."""
    visits = {path: json.loads(path.read_text()) for path in paths}
    data = _one(visits)
    facts = data["machine"]
    folder = results / f"{facts['date'][:10]}-{machine.slug(facts)}"
    shown = []
    for name, report in data["reports"].items():
        rows = trusted(report, data["vouching"][name])
        measured = Roofs(**report["roofs"])
        where = report["machine"]
        tables.write(folder, report["operation"], rows, where, measured, report["quick"], report["not_run"])
        shown += rows
    for index, (setting, report) in enumerate(model_table.merged(data["jobs"]).items()):
        name = setting.replace("/", "-").replace(":", "of")
        path = folder / "prune_model.json" if index == 0 else folder / "jobs" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        tables.replace_file(path, json.dumps(report, indent=1) + "\n")
    tables.replace_file(folder / "visit.md", page.whole(data, shown))
    if shown and "roofs" in data["rates"]:
        title = machine.sentence(facts)
        roofline.plot(folder / "roofline.svg", shown, Roofs(**data["rates"]["roofs"]), title)
    return folder


def _one(visits: dict[Path, dict]) -> dict:
    """All visits as one; the first visit's machine."""
    first = next(iter(visits.values()))
    for path, data in visits.items():
        if data["rehearsal"]:
            raise PublishError(f"{path} is no measurement. {tables.REHEARSAL}")
        ours, theirs = first["machine"]["gpu"], data["machine"]["gpu"]
        if ours != theirs:
            raise PublishError(f"{path} is of gpu {theirs}, the first visit of {ours}")
    commits = machine.joined(data["machine"]["commit"] for data in visits.values())
    found = first | {"machine": first["machine"] | {"commit": commits}, "vouching": {}}
    for data in visits.values():
        found["notes"] = list(dict.fromkeys([*found["notes"], *data["notes"]]))
        found["vouching"] |= dict.fromkeys(data["reports"], data["proof"])
        for part in ("parts", "proof", "rates", "reports", "jobs"):
            found[part] = found[part] | data[part]
    return found
