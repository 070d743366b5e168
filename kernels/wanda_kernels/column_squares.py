"""Column sums of squares that a kernel of a block's forward saves with its output.

Norms and gated products compute the inputs of linears. Their kernels have every value in a register once, so
they can sum the squares on the way, and the statistic need not read the tensor again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_wanted: ContextVar[bool] = ContextVar("column squares are wanted", default=False)


@contextmanager
def saving_column_squares() -> Iterator[None]:
    """Inside, kernels of `forward` that can do so save the column sums of squares of their outputs.

    It holds for the calling thread alone. `saved_column_squares` reads the sums.
    """
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def saved_column_squares(x: Tensor) -> Tensor | None:
    """The column sums of squares that were saved with this very tensor object.

    Args:
        x: `[..., features]`, in any dtype.

    Returns: partial sums, fp32 `[slabs, features]`, whose sum over slabs is sum x[t, j]^2 over the tokens t;
        None if none were saved, or if x was changed in place since.
    """
    partial, version = getattr(x, "_column_squares", (None, None))
    return partial if partial is not None and x._version == version else None


def are_wanted() -> bool:
    return _wanted.get()


def save(x: Tensor, partial: Tensor) -> None:
    """partial: fp32 `[slabs, features]` whose sum over slabs is that of x^2 over x's tokens."""
    # inference tensors have no version counter, so a later change in place would go unnoticed
    if not x.is_inference():
        x._column_squares = partial, x._version
