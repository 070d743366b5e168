"""Seconds of a call: medians over rounds that run every variant."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

LEAST_ROUNDS, MOST_ROUNDS = 3, 100
# A short call is repeated for so long between two readings of the clock: a model runs its linears one after
# the other, with their code in the caches, and a GPU's work must outlast the wait for it.
READING_S = 2e-3


def medians(
    calls: Mapping[str, Callable[[], object]], device: str, budget_s: float = 0.3
) -> dict[str, float]:
    """Median seconds of each call. Slow moments of the machine affect all variants of a round alike.

    Args:
        device: "cpu" or a GPU, which is waited for.
        budget_s: no round begins after these seconds, if each call was timed three times.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        seconds(call, device)  # warm-up
        repeats[name] = int(READING_S / max(seconds(call, device), 1e-6)) + 1
    end = time.perf_counter() + budget_s
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(seconds(call, device, repeats[name]))
    return {name: median(each) for name, each in times.items()}


def seconds(call: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds of one of `repeats` calls."""
    _wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - begin) / repeats


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
