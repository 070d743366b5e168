"""What a call costs before any work is done: each public function, and the registered op beneath it.

The time is of one call, from Python, on tensors so small that the work is nothing; `check_finite` is off.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.providers import OURS, TORCH, Lineup, Provider, ours, why_not
from benchmarks.rows import Row
from benchmarks.suite import Session

WIDTH = 8
PARAMS = {  # after the operands, as the public functions take them
    "add_sq_norm_": {},
    "add_coactivation_": {"activation": "silu", "power": 1},
    "add_hessian_": {},
    "add_gated_coactivation_": {"activation": "silu"},
    "prune_rows_": {"num_pruned": 4},
    "prune_nm_": {"n": 2, "m": 4},
    "prune_matrix_": {"rank": 4},
    "prune_variant_": {"ratio": 0.5},
}


class Dispatch:
    """As a `suite.Benchmark`, with calls for workloads."""

    operation = "dispatch"

    def lineup(self, session: Session) -> Lineup:
        not_run = {backend: why_not("prune_rows_", session.device, backend) for backend in OURS}
        return Lineup([], {backend: reason for backend, reason in not_run.items() if reason})

    def run(self, session: Session, line: Lineup) -> Iterator[list[Row]]:
        for operation, params in PARAMS.items():
            operands = _operands(operation, session.device)
            providers = _public(operation, session.device) + _raw(operation, operands, params)
            yield _measured(operation, operands, params, providers, session)


def _operands(operation: str, device: str) -> dict[str, Tensor]:
    row, matrix = torch.ones(WIDTH, device=device), torch.ones(1, WIDTH, device=device)
    if operation == "add_sq_norm_":
        return {"acc": row, "x": matrix}
    if operation == "add_hessian_":
        return {"acc": torch.zeros(WIDTH, WIDTH, device=device), "x": matrix}
    if operation == "add_coactivation_":
        return {"acc": torch.zeros(WIDTH, WIDTH, device=device), "gate": matrix, "x": matrix.clone()}
    if operation == "add_gated_coactivation_":
        accs = torch.zeros(2, WIDTH, WIDTH, device=device)
        outputs = {"gate": matrix, "up": matrix.clone(), "x": matrix.clone()}
        return {"acc_gate": accs[0], "acc_up": accs[1], **outputs}
    return {"weight": matrix, "scale": row}


def _public(operation: str, device: str) -> list[Provider]:
    served = [backend for backend in (TORCH, *OURS) if not why_not(operation, device, backend)]
    return [Provider(f"function, {backend}", ours(operation, backend)) for backend in served]


def _raw(operation: str, operands: dict[str, Tensor], params: dict) -> list[Provider]:
    """The registered op, called with what its schema names; a scale of ones is its own root."""
    known = {"mask": None, "sq_norm": None, "backend": "auto"} | operands | params
    found = []
    for name in (operation, f"native_{operation}"):
        packet = getattr(torch.ops.wanda_kernels, name, None)
        if packet is None:
            continue
        names = [argument.name for argument in packet.default._schema.arguments]
        values = known | ({"root": known["scale"], "scale": None} if "root" in names else {})
        if set(names) <= set(values):
            call = partial(packet, *[values[argument] for argument in names])
            found.append(Provider(f"torch.ops {name}", lambda *_, call=call: call()))
    return found


def _measured(operation: str, operands: dict, params: dict, providers: list[Provider], session) -> list[Row]:
    n_calls = 1 if session.quick else 500
    arguments = (*operands.values(), *params.values())
    calls = {provider.name: _repeated(provider.call, arguments, n_calls) for provider in providers}
    ring = timing.Ring(tuple(operands.values()), 0)
    timings = timing.measure(calls, ring, timing.cpu_stopwatch, session.budget_s)
    return [
        Row(
            operation="dispatch",
            linear="",
            shape="x".join(map(str, next(iter(operands.values())).shape)),
            dtype="float32",
            setting=operation,
            provider=name,
            headline=True,
            status="ok",
            time_ms=taken.seconds * 1e3 / n_calls,
            fastest_ms=taken.fastest * 1e3 / n_calls,
            spread_pct=taken.spread * 100,
            rounds=taken.rounds,
        )
        for name, taken in timings.items()
    ]


def _repeated(call: Callable, arguments: tuple, n_calls: int) -> Callable[..., None]:
    def run(*_: Tensor) -> None:
        for _ in range(n_calls):
            call(*arguments)

    return run


BENCHMARK = Dispatch()
