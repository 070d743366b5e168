"""Runs a benchmark: each workload's providers are judged first, then those that are right are timed."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import rows, timing
from benchmarks.providers import COMPILED, TORCH, Lineup, Provider, lineup, ours
from benchmarks.roofs import Roofs
from benchmarks.rows import Row
from benchmarks.workloads import Workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    device: str
    quick: bool
    compiled: bool
    budget_s: float  # of timed calls, for each provider on each workload
    roofs: Roofs


@dataclass(frozen=True)
class Benchmark:
    """An operation with its workloads, and the rivals that only this operation has."""

    operation: str
    workloads: Callable[[str, bool], list[Workload]]  # of (device, quick)
    peers: list[Provider]
    not_compiled: str = ""  # why torch.compile has nothing to take

    def lineup(self, session: Session) -> Lineup:
        not_compiled = self.not_compiled or (
            "" if session.compiled else "left out by --quick or --no-compile"
        )
        return lineup(self.operation, session.device, self.peers, not_compiled)

    def run(self, session: Session, line: Lineup) -> Iterator[list[Row]]:
        """Rows of one workload after another. Who turns out unable to run is moved to `line.not_run`."""
        for workload in self.workloads(session.device, session.quick):
            try:
                yield run_workload(workload, line, session)
            except (
                RuntimeError
            ) as error:  # out of memory in the reference, say; the other workloads still count
                yield [rows.judged(workload, "all", float("inf"), 0.0, _raised(error))]


def run_workload(workload: Workload, line: Lineup, session: Session) -> list[Row]:
    """Judge every provider on the workload, then time those that are right, interleaved."""
    operands = workload.make_operands()
    ring = timing.Ring(operands, timing.cache_bytes(session.device) if not session.quick else 0)
    ours(workload.operation, TORCH)(*operands, *workload.params)  # operands[0] now holds what is right
    torch.compiler.reset()  # else the ninth shape is not compiled any more
    found = {}
    for provider in line.providers:
        if provider.name == COMPILED and (not workload.headline or COMPILED in line.not_run):
            continue
        if not provider.takes(workload.dtype):
            continue
        row = _judge(provider, workload, ring, operands[0])
        if provider.optional and row.note.startswith("raises"):
            line.not_run[provider.name] = row.note
        else:
            found[provider.name] = row
    return _time(found, workload, line, ring, session)


def _judge(provider: Provider, workload: Workload, ring: timing.Ring, expected: Tensor) -> Row:
    """The provider's one untimed run, compared with the reference."""
    allowed = workload.tolerance + provider.slack
    slot = ring.take()
    try:
        provider.call(*slot, *workload.params)
        error = workload.error(slot[0], expected)
        return rows.judged(workload, provider.name, error, allowed)
    except Exception as exception:  # a rival of any kind must not end the run; the row says what happened
        logger.debug("%s", provider.name, exc_info=True)
        return rows.judged(workload, provider.name, float("inf"), allowed, _raised(exception))
    finally:
        ring.renew(slot)


def _raised(error: Exception) -> str:
    return f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _time(found: dict[str, Row], workload: Workload, line: Lineup, ring, session: Session) -> list[Row]:
    right = {row.provider for row in found.values() if row.status != rows.FAILED}
    calls = {
        provider.name: lambda *operands, call=provider.call: call(*operands, *workload.params)
        for provider in line.providers
        if provider.name in right
    }
    watch = timing.stopwatch_of(session.device)
    timings = timing.measure(calls, ring, watch, session.budget_s) if calls else {}
    return [
        rows.timed(row, timings[name], workload, session.roofs) if name in timings else row
        for name, row in found.items()
    ]
