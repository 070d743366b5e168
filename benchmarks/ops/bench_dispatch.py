"""What a call of each public function costs before any work is done.

The time is of one call, from Python, on tensors so small that the work is nothing; `check_finite` is off.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.core import timing
from benchmarks.core.providers import OURS, TORCH, Lineup, ours, why_not
from benchmarks.core.rows import OK, Row
from benchmarks.core.suite import Session

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
    """Has the interface of `suite.Benchmark`; its workloads are operations."""

    operation = "dispatch"

    def cases(self, session: Session) -> list[str]:
        return list(PARAMS)

    def lineup(self, session: Session) -> Lineup:
        not_run = {backend: why_not("prune_rows_", session.device, backend) for backend in OURS}
        return Lineup([], {backend: reason for backend, reason in not_run.items() if reason})

    def run(self, session: Session, line: Lineup) -> Iterator[list[Row]]:
        for operation, params in PARAMS.items():
            operands = _operands(operation, session.device)
            calls = _calls(operation, session.device)
            yield _measured(operation, (*operands.values(), *params.values()), calls, session)


def _operands(operation: str, device: str) -> dict[str, Tensor]:
    row, matrix = torch.ones(WIDTH, device=device), torch.ones(1, WIDTH, device=device)
    accs = torch.zeros(2, WIDTH, WIDTH, device=device)
    if operation.startswith("prune"):
        return {"weight": matrix, "scale": row}
    return {
        "add_sq_norm_": {"acc": row, "x": matrix},
        "add_hessian_": {"acc": accs[0], "x": matrix},
        "add_coactivation_": {"acc": accs[0], "gate": matrix, "x": matrix.clone()},
        "add_gated_coactivation_": {"acc_gate": accs[0], "acc_up": accs[1], "gate": matrix}
        | {"up": matrix.clone(), "x": matrix.clone()},
    }[operation]


def _calls(operation: str, device: str) -> dict[str, Callable]:
    served = [backend for backend in (TORCH, *OURS) if not why_not(operation, device, backend)]
    return {f"function, {backend}": ours(operation, backend) for backend in served}


def _measured(operation: str, arguments: tuple, calls: dict[str, Callable], session: Session) -> list[Row]:
    n_calls = 1 if session.quick else 500

    def repeated(call: Callable) -> Callable[..., None]:
        return lambda *_: [call(*arguments) for _ in range(n_calls)]

    operands = tuple(each for each in arguments if isinstance(each, Tensor))
    many = {name: repeated(call) for name, call in calls.items()}
    timings = timing.measure(many, timing.Ring(operands, 0), timing.cpu_stopwatch, session.budget_s)
    about = dict(operation="dispatch", linear="", shape="x".join(map(str, operands[0].shape)))
    about |= dict(dtype="float32", setting=operation, headline=True, status=OK)
    return [
        Row(
            **about,
            provider=name,
            time_ms=taken.seconds * 1e3 / n_calls,
            fastest_ms=taken.fastest * 1e3 / n_calls,
            spread_pct=taken.spread * 100,
            rounds=taken.rounds,
        )
        for name, taken in timings.items()
    ]


BENCHMARK = Dispatch()
