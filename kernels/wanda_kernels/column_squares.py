"""Column sums of squares that a forward's kernel leaves with its output, so that nobody reads that again.

A norm or a gated product is what linears receive; its kernel has every value at hand once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_wanted: ContextVar[bool] = ContextVar("wanted", default=False)


@contextmanager
def squares_left() -> Iterator[None]:
    """Inside, in this context, kernels that can leave their outputs' sums do."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def are_wanted() -> bool:
    return _wanted.get()


def leave(x: Tensor, partial: Tensor) -> None:
    """partial: fp32 `[slabs, features]` whose sum over slabs is that of x^2 over x's tokens."""
    if not x.is_inference():  # whose changes nobody counts
        x._column_squares = partial, x._version


def left_with(x: Tensor) -> Tensor | None:
    """What was left with this very tensor; None where nothing was, or it was changed in place since."""
    partial, version = getattr(x, "_column_squares", (None, None))
    return partial if partial is not None and x._version == version else None
