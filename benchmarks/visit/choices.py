"""What was fastest beside what the tables choose: the entries that the measurements would change."""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.providers import is_ours
from benchmarks.rows import OK, Row
from wanda_kernels.dispatch import backends
from wanda_kernels.triton_ops import add_coactivation

CLEARLY = 1.03  # a smaller difference is no reason to change a table


@dataclass(frozen=True)
class Choice:
    """One workload: who the tables choose, who was fastest, and which entry stands against it."""

    row: Row  # of the chosen one
    fastest: Row
    entry: str  # of which table

    @property
    def factor(self) -> float:
        return self.row.time_ms / self.fastest.time_ms

    @property
    def change(self) -> str:
        """The change that the measurement asks for; empty where the tables are right."""
        return self.entry if self.factor > CLEARLY else ""


def choices(rows: Iterable[Row], facts: dict) -> list[Choice]:
    """Of every workload that two or more of ours have run."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.status == OK and row.time_ms and row.operation in backends.TABLE and is_ours(row.provider):
            cases.setdefault(row.case, {})[row.provider] = row
    found = [_choice(ours, facts) for ours in cases.values() if len(ours) > 1]
    return [choice for choice in found if choice]


def chosen(ours: dict[str, Row], device: str) -> Row | None:
    """The row of the backend that `auto` takes there: the first of the device's order that was measured."""
    operation = next(iter(ours.values())).operation
    order = backends.order(operation, device)
    order = order if device == "cuda" else ("triton", *order)
    return next((ours[backend] for backend in order if backend in ours), None)


def _choice(ours: dict[str, Row], facts: dict) -> Choice | None:
    row = chosen(ours, facts["device"])
    if row is None:
        return None
    plain = {name: each for name, each in ours.items() if "," not in name}
    fastest = min(plain.values(), key=lambda each: each.time_ms)
    paths = {name.partition(", ")[2]: each for name, each in ours.items() if "," in name}
    if fastest.provider == row.provider and len(paths) > 1:
        return _path_choice(row, paths, facts)
    order = f"backends.order: {fastest.provider} before {row.provider} for {row.operation}"
    return Choice(row, fastest, order)


def _path_choice(row: Row, paths: dict[str, Row], facts: dict) -> Choice | None:
    """Among the ways within the Triton backend, by `coactivation_paths.PATHS`."""
    capability = tuple(map(int, facts.get("capability", "0.0").split(".")))
    n_out, n_in = map(int, row.shape.split("x"))
    taken = paths.get(add_coactivation.path(capability, n_out, n_in))
    if taken is None:
        return None
    name, fastest = min(paths.items(), key=lambda item: item[1].time_ms)
    entry = f"coactivation_paths.PATHS: {name!r} for {row.shape} on {facts.get('capability', 'a CPU')}"
    return Choice(taken, fastest, entry)
