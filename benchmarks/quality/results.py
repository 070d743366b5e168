"""Cells of the quality tables, kept in `benchmarks/results/quality/MODEL.json` and written after each."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.core import machine
from benchmarks.core.results import compact_json, replace_file

RESULTS = machine.RESULTS / "quality"


@dataclass(frozen=True)
class Cell:
    """One pruned model. nsamples 0: the method needs no calibration."""

    method: str
    pattern: str
    nsamples: int
    seed: int
    perplexity: float
    sparsity: float
    commit: str
    cpu_capability: str  # the instruction set of torch's kernels, on which rounding depends


@dataclass(frozen=True)
class Cost:
    """One whole job in a process of its own: load, calibrate, prune, save; no perplexity."""

    method: str
    pattern: str
    nsamples: int
    seconds: float
    peak_bytes: int  # resident, Python and torch included


@dataclass
class Results:
    label: str
    protocol: str = ""
    dense: float = 0.0
    cells: list[Cell] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    machine: dict = field(default_factory=dict)  # of the costs

    @classmethod
    def open(cls, label: str, folder: Path = RESULTS) -> "Results":
        file = folder / f"{label}.json"
        if not file.exists():
            return cls(label)
        content = json.loads(file.read_text())
        content["cells"] = [Cell(**cell) for cell in content["cells"]]
        content["costs"] = [Cost(**cost) for cost in content["costs"]]
        return cls(**content)

    @classmethod
    def every(cls, folder: Path = RESULTS) -> list["Results"]:
        return [cls.open(file.stem, folder) for file in sorted(folder.glob("*.json"))]

    def save(self, folder: Path = RESULTS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{self.label}.json", compact_json(asdict(self)))

    def require_protocol(self, protocol: str, dense: Callable[[], float]) -> None:
        """Cells of one file are comparable: same dtype, texts and windows."""
        if not self.protocol:
            self.protocol, self.dense = protocol, dense()
            self.save()
        if self.protocol != protocol:
            raise SystemExit(
                f"{self.label}: measured with {self.protocol!r}, not {protocol!r}; name another --label"
            )

    def has(self, method: str, pattern: str, nsamples: int, seed: int) -> bool:
        key = (method, pattern, nsamples, seed)
        return any((c.method, c.pattern, c.nsamples, c.seed) == key for c in self.cells)

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self.save()

    def perplexities(self, method: str, pattern: str, nsamples: int) -> dict[int, float]:
        """By seed; a method without calibration has one for every size."""
        size = 0 if method == "magnitude" else nsamples
        cells = (c for c in self.cells if (c.method, c.pattern, c.nsamples) == (method, pattern, size))
        return {cell.seed: cell.perplexity for cell in cells}

    def cost(self, method: str, pattern: str) -> Cost | None:
        return next((c for c in self.costs if (c.method, c.pattern) == (method, pattern)), None)


def mean_and_std(perplexities: dict[int, float]) -> str:
    """ "59.44 (1.20)": the mean over seeds and the sample standard deviation."""
    values = list(perplexities.values())
    if not values:
        return "not measured"
    digits = 1 if statistics.mean(values) >= 100 else 2
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({statistics.stdev(values):.{digits}f})"
