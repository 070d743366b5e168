"""One sum for all linears that read the same tensor in a forward."""

import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from wanda_fast.model.linears import Linear

T = TypeVar("T")


class SharedByInput(Generic[T]):
    """Sums by linear name; linears that read the same tensor in a forward share one of a kind.

    The tensor's identity decides, not a name. Batches may run in threads of their own.

    Args:
        make: makes a linear's sum, or returns None for a linear that has none.
        kind: only linears of equal kind share.
    """

    def __init__(self, make: Callable[[Linear], T | None], kind: Callable[[Linear], object]):
        self.by_name: dict[str, T] = {}
        self._make, self._kind = make, kind
        self._forward = _Readers()

    def sharing(self) -> dict[str, str]:
        """Linear name -> the first name that has the same sum."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(own), name) for name, own in self.by_name.items()}

    def share(self, linear: Linear, first: Linear) -> None:
        """Give `linear` the sum of `first`, which is made if no input has reached it yet."""
        if first.name not in self.by_name:
            self.by_name[first.name] = self._make(first)
        self.by_name.setdefault(linear.name, self.by_name[first.name])

    def begin(self) -> None:
        """A forward begins, or all are over."""
        self._forward.readers.clear()

    def to_add(self, linear: Linear, x: Tensor) -> T | None:
        """The sum that x has to be added to; None if the linear has none, or a sharer has added x."""
        key = id(x), self._kind(linear)
        reference, shared = self._forward.readers.get(key, (None, None))
        # The id may have belonged to a tensor that is gone.
        if reference is not None and reference() is not x:
            shared = None
        own = self.by_name.get(linear.name) or shared or self._make(linear)
        if own is None:
            return None
        self.by_name[linear.name] = own
        if own is shared:
            return None
        self._forward.readers[key] = (weakref.ref(x), own)
        return own


class _Readers(threading.local):
    """The sums that have received a tensor in this thread's forward: (id, kind) -> (tensor, sum)."""

    def __init__(self):
        self.readers: dict[tuple, tuple[weakref.ref, object]] = {}
