"""The implementations of an operation: the published algorithm, plain torch, and our backends.

All are called alike: operands, then parameters, as the public function takes them. `check_finite` is off, as
in a pruning run, which checks once a block.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import wanda_kernels
from benchmarks.core import machine
from wanda_kernels.dispatch import backends

PUBLISHED, TORCH = "published", "torch"
OURS = tuple(name for name in backends.BACKENDS if name != TORCH)


@dataclass(frozen=True)
class Provider:
    name: str
    call: Callable[..., object]
    slack: float = 0.0  # error it may make beyond the workload's tolerance, by its own definition


@dataclass(frozen=True)
class Lineup:
    """The providers of one operation on this machine, and why the others are not among them."""

    providers: list[Provider]
    not_run: dict[str, str]


def lineup(operation: str, device: str, peers: list[Provider]) -> Lineup:
    """The providers of `operation` on `device`; `peers` are the published algorithm and other rivals."""
    reasons = {backend: why_not(operation, device, backend) for backend in OURS}
    served = [TORCH, *(backend for backend, reason in reasons.items() if not reason)]
    providers = [*peers, *(Provider(backend, ours(operation, backend)) for backend in served)]
    return Lineup(providers, {backend: reason for backend, reason in reasons.items() if reason})


def why_not(operation: str, device: str, backend: str) -> str:
    """Why a backend is not measured; interpreted kernels are only in a rehearsal of a GPU run."""
    if backend == "triton" and device == "cpu" and not machine.rehearsing():
        return "needs a GPU; interpreted, its time says nothing"
    return backends.why_not(operation, device, backend)


def ours(operation: str, backend: str) -> Callable[..., object]:
    """The public function, bound to a backend."""
    function = getattr(wanda_kernels, operation)
    judged = "check_finite" in inspect.signature(function).parameters
    return partial(function, backend=backend, **({"check_finite": False} if judged else {}))
