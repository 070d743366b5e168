"""A row: one provider on one workload, its result judged and its time set beside the roof and the rivals."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.core.providers import PUBLISHED, TORCH
from benchmarks.core.roofs import Roofs
from benchmarks.core.timing import Timing
from benchmarks.core.workloads import Workload

OK, FAILED = "ok", "FAILED"


@dataclass(frozen=True)
class Row:
    operation: str
    linear: str
    shape: str
    dtype: str
    setting: str
    provider: str
    headline: bool
    status: str  # OK, or FAILED: the result differs from the reference's
    note: str = ""  # why it failed
    error: float | None = None  # fraction of weights that differ, or largest relative error of a sum
    time_ms: float | None = None  # median
    fastest_ms: float | None = None
    spread_pct: float | None = None
    rounds: int | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    roof: str | None = None
    roof_pct: float | None = None
    over_published: float | None = None
    over_torch: float | None = None
    # of the run: the roofs that it measured first, the load average before it
    copy_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    load_before: float | None = None
    commit: str = ""
    date: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        return self.operation, self.shape, self.dtype, self.setting


def judged(workload: Workload, provider: str, error: float, allowed: float, note: str = "") -> Row:
    """A row without a time; FAILED where the error is larger than allowed."""
    right = not note and error <= allowed
    wrong = note or f"error {error:.3g}, allowed {allowed:.3g}"
    return Row(
        operation=workload.operation,
        linear=workload.linear,
        shape=workload.shape,
        dtype=str(workload.dtype).removeprefix("torch."),
        setting=workload.setting,
        provider=provider,
        headline=workload.headline,
        status=OK if right else FAILED,
        note="" if right else wrong,
        error=error if error != float("inf") else None,
    )


def timed(row: Row, timing: Timing, workload: Workload, roofs: Roofs) -> Row:
    """The row with its time, its rates, and its share of the roof that bounds it."""
    bytes_per_s, flops_per_s = workload.n_bytes / timing.seconds, workload.n_flops / timing.seconds
    shares = {"bytes": bytes_per_s / roofs.bytes_per_s, "flops": flops_per_s / roofs.flops_per_s}
    return replace(
        row,
        time_ms=timing.seconds * 1e3,
        fastest_ms=timing.fastest * 1e3,
        spread_pct=timing.spread * 100,
        rounds=timing.rounds,
        gb_s=bytes_per_s / 1e9,
        tflop_s=flops_per_s / 1e12,
        roof=workload.bound,
        roof_pct=shares[workload.bound] * 100,
    )


def with_speed_ups(rows: Iterable[Row]) -> list[Row]:
    """Rows with the factors over the published code and over torch.

    A provider that failed on any workload of an operation gets no factor on that operation's other workloads,
    and no factor is given over it.
    """
    rows = list(rows)
    distrusted = {(row.operation, row.provider) for row in rows if row.status == FAILED}
    times = {(*row.case, row.provider): row.time_ms for row in rows}

    def factor(row: Row, baseline: str) -> float | None:
        theirs = times.get((*row.case, baseline))
        if {(row.operation, row.provider), (row.operation, baseline)} & distrusted:
            return None
        return theirs / row.time_ms if theirs and row.time_ms else None

    return [
        replace(row, over_published=factor(row, PUBLISHED), over_torch=factor(row, TORCH)) for row in rows
    ]
