"""Replaces the forwards of modules for the duration of a context."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside the context, each module's forward is the function given for it.

    At the end every module has its earlier forward again. That can be the class's own, or one that was set on
    the instance, as accelerate's hooks do.
    """
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
