"""`python -m benchmarks.visit.truth OPERATION:BACKEND ...`: each case against the reference, in JSON lines.

Selections must leave the reference's very bits, masks and return value; sums stay within the workload's
tolerance; operands that are only read must not change. Masks hold garbage beforehand, and torch fills what
it allocates with NaN or the largest integer, so that what nobody writes is seen.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.catalogue import BENCHMARKS
from benchmarks.providers import OURS, TORCH, Provider, lineup, ours, why_not
from benchmarks.visit.operands import RECIPES, draw, names, recipes
from benchmarks.workloads import Workload

GARBAGE = 0xA5
PASSED, WRONG, NOT_RUN, STARTED = "passed", "wrong", "not run", "started"


def cases(operation: str, device: str, quick: bool, short: bool) -> list[tuple[Workload, str]]:
    """(workload, recipe): every recipe on the headline shapes, random numbers on the others.

    short: every recipe on the first workload alone.
    """
    workloads = BENCHMARKS[operation.rstrip("_")].workloads(device, quick)
    shown = {workload.shape for workload in workloads if workload.headline}
    hard = [work for work in workloads if work.shape in shown]
    easy = [work for work in workloads if work.shape not in shown]
    if short:
        hard, easy = workloads[:1], []
    found = [(work, recipe) for recipe in RECIPES for work in hard if recipe in recipes(work)]
    return found + [(work, RECIPES[0]) for work in easy]


def providers(operation: str, device: str, backend: str) -> list[Provider]:
    """The backend, and each path that may be forced within it."""
    peers = [peer for peer in BENCHMARKS[operation.rstrip("_")].peers if peer.needs == backend]
    line = lineup(operation, device, peers, not_compiled="only what is ours is judged here")
    return [provider for provider in line.providers if backend in (provider.name, provider.needs)]


def verdict(provider: Provider, workload: Workload, recipe: str, seed: int) -> tuple[str, str]:
    """(PASSED, WRONG or NOT_RUN, why)."""
    try:
        with torch.inference_mode(), poisoned_empties():
            difference = _difference(provider, workload, recipe, seed)
    except torch.OutOfMemoryError as error:
        return NOT_RUN, _first_line(error)
    except Exception as error:  # whatever a kernel raises on finite operands is a finding
        return (NOT_RUN if provider.optional else WRONG), f"{type(error).__name__}: {_first_line(error)}"
    return (WRONG, difference) if difference else (PASSED, "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _difference(provider: Provider, workload: Workload, recipe: str, seed: int) -> str:
    """What the provider's result differs in; empty where it is right."""
    reference = ours(workload.operation, TORCH)
    before = draw(workload, recipe, seed)
    if names(workload.operation)[0].startswith("acc"):
        before = _copy(before)
        reference(*before, *workload.params)
    masks = _masks(provider, workload, before)
    expected, got = _copy(before), _copy(before)
    wanted = reference(*expected, *workload.params, **masks[0])
    value = provider.call(*got, *workload.params, **masks[1])
    allowed = workload.tolerance + provider.slack
    for name, old, right, new in zip(names(workload.operation), before, expected, got, strict=False):
        if not isinstance(old, Tensor):
            continue
        if torch.equal(_bits(old), _bits(right)):
            if not torch.equal(_bits(new), _bits(old)):
                return f"{name} is changed, which the reference only reads"
        elif not (error := workload.error(new, right)) <= allowed:
            return f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    if masks[0] and not torch.equal(masks[0]["mask"], masks[1]["mask"]):
        return "another mask than the reference's"
    if isinstance(wanted, Tensor) and not torch.equal(wanted, value):
        return f"returns {value.item()}, the reference {wanted.item()}"
    return ""


def _copy(operands: tuple) -> tuple:
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in operands)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _masks(provider: Provider, workload: Workload, operands: tuple) -> list[dict[str, Tensor]]:
    """Two masks full of garbage, for the reference and the backend, where the operation writes one."""
    if provider.name not in OURS or "mask" not in names(workload.operation):
        return [{}, {}]
    n_rows, n_cols = operands[0].shape
    shape, device = (n_rows, -(-n_cols // 8)), operands[0].device
    return [{"mask": torch.full(shape, GARBAGE, dtype=torch.uint8, device=device)} for _ in range(2)]


@contextmanager
def poisoned_empties() -> Iterator[None]:
    """Every torch.empty, in C++ too, holds NaN or the largest integer."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory, by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def spoilt(provider: Provider) -> Provider:
    """A provider that ends with one wrong number, for rehearsals."""

    def call(*operands, **named):
        value = provider.call(*operands, **named)
        operands[0].view(-1)[-1] += 1.5
        return value

    return replace(provider, call=call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="+", metavar="OPERATION:BACKEND")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--out", required=True, type=Path, help="JSON lines")
    parser.add_argument("--limit", type=float, default=60, help="seconds; no case is begun after them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--short", action="store_true", help="one workload")
    parser.add_argument("--spoil", default="", metavar="OPERATION")
    options = parser.parse_args()
    until = time.monotonic() + options.limit
    with options.out.open("w") as file:
        for operation, backend in (subject.split(":") for subject in options.subjects):
            write = partial(_write, file, operation, backend)
            reason = why_not(operation, options.device, backend)
            if reason:
                write(None, NOT_RUN, reason)
                continue
            _judge(operation, backend, options, until, write)


def _write(file, operation: str, backend: str, case: str | None, found: str, note: str = "", **more) -> None:
    line = {"operation": operation, "backend": backend, "case": case, "verdict": found, "note": note}
    file.write(json.dumps(line | more) + "\n")
    file.flush()


def _judge(operation: str, backend: str, options, until: float, write) -> None:
    subjects = providers(operation, options.device, backend)
    if options.spoil == operation:
        subjects = [spoilt(provider) for provider in subjects]
    print(f"subject {operation}:{backend}", flush=True)
    planned = cases(operation, options.device, options.quick, options.short)
    asked = {work: [each for each in subjects if each.takes(work.dtype)] for work, _ in planned}
    write(None, STARTED, planned=sum(len(asked[workload]) for workload, _ in planned))
    for number, (workload, recipe) in enumerate(planned):
        for provider in asked[workload]:
            dtype = str(workload.dtype).removeprefix("torch.")
            case = f"{provider.name}, {workload.shape} {dtype}, {workload.setting}, {recipe}"
            if time.monotonic() > until:
                return
            write(case, STARTED)
            write(case, *verdict(provider, workload, recipe, options.seed + number))


if __name__ == "__main__":
    main()
