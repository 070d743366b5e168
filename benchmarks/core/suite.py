"""Runs a benchmark: judges every provider's result on a workload, then times those that are right."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.core import results, rows, timing
from benchmarks.core.providers import OURS, TORCH, Lineup, Provider, lineup, ours
from benchmarks.core.roofs import Roofs
from benchmarks.core.rows import Row, with_speed_ups
from benchmarks.core.workloads import Workload

logger = logging.getLogger(__name__)

BUDGET_S = {"cpu": 1.0, "cuda": 0.15}  # of timed calls, for each provider on each workload


@dataclass(frozen=True)
class Session:
    device: str
    quick: bool
    budget_s: float
    roofs: Roofs
    headline: bool = False  # the headline workloads alone
    until: float = float("inf")  # on time.monotonic(): no workload begins later


@dataclass(frozen=True)
class Benchmark:
    """An operation, its workloads, and the rivals that only this operation has."""

    operation: str
    workloads: Callable[[str, bool], list[Workload]]  # of (device, quick)
    peers: list[Provider]

    def cases(self, session: Session) -> list[Workload]:
        """The headline workloads first, since time may run out."""
        found = self.workloads(session.device, session.quick)
        found = [workload for workload in found if workload.headline or not session.headline]
        return sorted(found, key=lambda workload: not workload.headline)

    def lineup(self, session: Session) -> Lineup:
        return lineup(self.operation, session.device, self.peers)

    def run(self, session: Session, line: Lineup) -> Iterator[list[Row]]:
        """The rows of one workload after another."""
        for workload in self.cases(session):
            try:
                yield run_workload(workload, line, session)
            except RuntimeError as error:  # such as out of memory in the reference; the others still count
                yield [rows.judged(workload, "all", float("inf"), 0.0, _raised(error))]


@torch.inference_mode()
def measure(
    benchmark, session: Session, facts: dict, folder: Path, done: Callable[[list[Row]], None]
) -> list[Row]:
    """All rows of a benchmark, written to `folder` after each workload; `done` is called with its rows."""
    line = benchmark.lineup(session)
    found: list[Row] = []
    for new in benchmark.run(session, line):
        found = with_speed_ups(found + new)
        results.write(folder, found, facts, session.roofs, session.quick, line.not_run)
        done(found[-len(new) :])
        if time.monotonic() > session.until:
            break
    return found


def run_workload(workload: Workload, line: Lineup, session: Session) -> list[Row]:
    """Judge every provider on the workload, then time those that are right, interleaved."""
    providers = _of_experts(line.providers) if workload.experts else line.providers
    providers = [*providers, *workload.peers]
    operands = workload.make_operands()
    cache_bytes = timing.cache_bytes(session.device) if not session.quick else 0
    ring = timing.Ring(operands, cache_bytes, workload.changed)
    # the reference leaves the right result in the operand that it changes
    ours(workload.operation, TORCH)(*operands, *workload.params)
    expected = operands[workload.changed]
    found = {provider.name: _judge(provider, workload, ring, expected) for provider in providers}
    return _time(found, workload, providers, ring, session)


def _of_experts(providers: list[Provider]) -> list[Provider]:
    """For a stack: other people's code in a loop over experts, and ours both at once and in a loop."""
    at_once = [each for each in providers if each.name in (TORCH, *OURS)]
    loops = [replace(each, name=f"{each.name}, by expert") for each in at_once if each.name in OURS]
    loops += [each for each in providers if each not in at_once]
    return at_once + [replace(each, call=_by_expert(each.call)) for each in loops]


def _by_expert(call: Callable[..., object]) -> Callable[..., None]:
    def run(weight: Tensor, scale: Tensor, *params: object) -> None:
        for matrix, row in zip(weight, scale, strict=True):
            call(matrix, row, *params)

    return run


def _judge(provider: Provider, workload: Workload, ring: timing.Ring, expected: Tensor) -> Row:
    """The provider's one untimed run, compared with the reference."""
    allowed = workload.tolerance + provider.slack
    slot = ring.take()
    try:
        provider.call(*slot, *workload.params)
        error = workload.error(slot[workload.changed], expected)
        return rows.judged(workload, provider.name, error, allowed)
    except Exception as exception:  # no provider's error may end the run; the row says what happened
        logger.debug("%s", provider.name, exc_info=True)
        return rows.judged(workload, provider.name, float("inf"), allowed, _raised(exception))
    finally:
        ring.renew(slot)


def _raised(error: Exception) -> str:
    return f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _time(
    found: dict[str, Row], workload: Workload, providers: list[Provider], ring, session: Session
) -> list[Row]:
    right = {row.provider for row in found.values() if row.status != rows.FAILED}
    calls = {
        provider.name: lambda *operands, call=provider.call: call(*operands, *workload.params)
        for provider in providers
        if provider.name in right
    }
    watch = timing.stopwatch_of(session.device)
    timings = timing.measure(calls, ring, watch, session.budget_s) if calls else {}
    return [
        rows.timed(row, timings[name], workload, session.roofs) if name in timings else row
        for name, row in found.items()
    ]
