"""Full fp32 precision for an operation's matmuls, even if the caller allows TF32 (11 bits) or bf16 (8)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

DEVICES = ("cpu", "cuda")
P, R = ParamSpec("P"), TypeVar("R")


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run the function with torch's fp32 matmul precision at "highest" and without autocast.

    The caller's settings are restored.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        precision = _precision()
        if precision == "highest" and not _autocasts():
            return function(*args, **kwargs)
        with _highest(precision), _without_autocast():
            return function(*args, **kwargs)

    return run


@contextmanager
def tf32_on_gpus() -> Iterator[None]:
    """Context in which a GPU's fp32 matmuls run on tensor cores, with operands rounded to TF32 (11 bits)."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _autocasts() -> bool:
    return any(map(torch.is_autocast_enabled, DEVICES))


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, DEVICES):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _precision() -> str | None:
    """The caller's setting; None if devices have different ones, which torch reports by an error."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def _highest(precision: str | None) -> Iterator[None]:
    devices = () if precision else (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    of_devices = [each.fp32_precision for each in devices]
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision:
            torch.set_float32_matmul_precision(precision)
        for each, before in zip(devices, of_devices, strict=True):
            each.fp32_precision = before
