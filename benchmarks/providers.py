"""Who computes an operation: the published algorithm, plain torch, torch.compile, and each of our backends.

All are called alike: operands, then parameters, as the public function takes them. `check_finite` is off, as
in the driver, which asks for that verdict once a block.
"""

import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import wanda_kernels
from wanda_kernels.dispatch import backends

PUBLISHED, TORCH, COMPILED = "published", "torch", "torch.compile"
OURS = tuple(name for name in backends.BACKENDS if name != TORCH)


@dataclass(frozen=True)
class Provider:
    name: str
    call: Callable[..., object]
    slack: float = 0.0  # error it may make beyond the workload's tolerance, by its own definition
    needs: str = ""  # the backend that it is part of
    optional: bool = False  # may be unable to run here, which is a reason to leave it out, not a failure
    dtypes: tuple[torch.dtype, ...] = ()  # that it takes; none named: all

    def takes(self, dtype: torch.dtype) -> bool:
        return not self.dtypes or dtype in self.dtypes


@dataclass(frozen=True)
class Lineup:
    """The providers of one operation on this machine, and why the others are not among them."""

    providers: list[Provider]
    not_run: dict[str, str]


def lineup(operation: str, device: str, peers: list[Provider], not_compiled: str) -> Lineup:
    """All who can run `operation` on `device`; `peers` are the published algorithm and other rivals.

    `not_compiled`: why torch.compile is left out, empty where it is not.
    """
    not_run = {peer.name: why_not(operation, device, peer.needs) for peer in peers if peer.needs}
    not_run = {name: reason for name, reason in not_run.items() if reason}
    providers = [peer for peer in peers if peer.name not in not_run]
    providers.append(Provider(TORCH, ours(operation, TORCH)))
    if not_compiled:
        not_run[COMPILED] = not_compiled
    else:
        providers.append(Provider(COMPILED, _compiled(operation), optional=True))
    for backend in OURS:
        reason = why_not(operation, device, backend)
        if reason:
            not_run[backend] = reason
        else:
            providers.append(Provider(backend, ours(operation, backend)))
    return Lineup(providers, not_run)


def why_not(operation: str, device: str, backend: str) -> str:
    """Why a backend is not measured; interpreted kernels are only in a rehearsal of a GPU run."""
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and os.environ.get("WANDA_BENCH_REHEARSE") != "1":
        return "needs a GPU; interpreted, its time says nothing"
    return backends.why_not(operation, device, backend)


def is_ours(provider: str) -> bool:
    """A backend of ours, or a path that is forced within one: "triton", "triton, fused"."""
    return provider.partition(",")[0] in OURS


def ours(operation: str, backend: str) -> Callable[..., object]:
    """The public function, bound to a backend."""
    function = getattr(wanda_kernels, operation)
    judged = "check_finite" in inspect.signature(function).parameters
    return partial(function, backend=backend, **({"check_finite": False} if judged else {}))


def _compiled(operation: str) -> Callable[..., object]:
    reference = backends.TABLE[operation][TORCH]
    without = {name: None for name in ("mask", "sq_norm") if name in inspect.signature(reference).parameters}
    torch._logging.set_logs(dynamo=logging.ERROR)  # a graph break shows in the time
    return torch.compile(partial(reference, **without), dynamic=False)
