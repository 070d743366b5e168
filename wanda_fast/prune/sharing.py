"""One statistic for linears that read the same tensor in a forward: its identity says so, not a name."""

import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from wanda_fast.model.architecture import Linear

T = TypeVar("T")


class _Readers(threading.local):
    """What a forward's linears have read so far, one a thread."""

    def __init__(self):
        self.by_identity: dict[int, tuple[weakref.ref, object]] = {}


class SharedByInput(Generic[T]):
    """Statistics by linear name. Batches may run in threads of their own.

    Args:
        make: a linear's statistic, or None where it has none; None in its place: no linear has one.
    """

    def __init__(self, make: Callable[[Linear], T | None] | None):
        self.by_name: dict[str, T | None] = {}
        self._make = make
        self._readers = _Readers()

    def begin(self) -> None:
        """A forward begins, or all are over."""
        self._readers.by_identity.clear()

    def to_add(self, linear: Linear, x: Tensor) -> T | None:
        """The statistic that x has to be added to; None where there is none, or it has x already."""
        if self._make is None:
            return None
        readers = self._readers.by_identity
        reference, shared = readers.get(id(x), (None, None))
        if reference is not None and reference() is not x:  # the address of a tensor that is gone
            shared = None
        own = self.by_name.get(linear.name)
        if own is None:
            own = self.by_name[linear.name] = shared or self._make(linear)
        if own is None or own is shared:
            return None
        readers[id(x)] = (weakref.ref(x), own)
        return own
