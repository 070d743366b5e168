"""Full fp32 precision for an operation's matmuls, even if the caller allows TF32 (11 bits) or bf16 (8)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P, R = ParamSpec("P"), TypeVar("R")


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run the function with torch's fp32 matmul precision at "highest", then restore the caller's."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        precision = _precision()
        if precision == "highest":
            return function(*args, **kwargs)
        with _highest(precision):
            return function(*args, **kwargs)

    return run


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
