"""What the calibration tokens say about each linear's input, gathered by forward hooks during a block's
dense pass.

Linears that read the same tensor (q, k, v; gate, up) share one statistic: the tensor's identity says so, not
a name.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from wanda_fast.architecture import Block, Linear
from wanda_fast.coactivation import Coactivation
from wanda_fast.sq_norm import SquaredNorm

Statistic = SquaredNorm | Coactivation


class _Forward(threading.local):
    """What is known of the forward at hand, one a thread."""

    def __init__(self):
        self.calls: list[str] = []
        self.readers: dict[int, tuple[weakref.ref, SquaredNorm]] = {}  # inputs, by identity
        self.gate_outputs: dict[nn.Module, Tensor] = {}
        self.deferred: dict[nn.Module, SquaredNorm] = {}  # gates whose norm their up projection's pass adds

    def begin(self) -> None:
        for known in (self.calls, self.readers, self.gate_outputs, self.deferred):
            known.clear()


class BlockStatistics:
    """The statistics of one block's linears. `by_name[linear.name].acc` is what stands under the score's
    root.

    Args:
        block: the block that will run.
        statistic: what to gather for a linear; None for nothing.
        fused: a gate's norm may be added with its up projection's co-activation, in one read.
        timed: makes a context around each addition.
    """

    def __init__(
        self,
        block: Block,
        statistic: Callable[[Linear], Statistic | None],
        fused: bool = True,
        timed: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.block, self.fused, self.timed = block, fused, timed
        self.by_name: dict[str, Statistic] = {}
        self._make = statistic
        self._now = _Forward()
        self._coactivations = {
            linear.name: stat
            for linear in block.linears
            if linear.gated is not None and isinstance(stat := statistic(linear), Coactivation)
        }

    @property
    def calls(self) -> list[str]:
        """The linears in the order of their calls in the latest forward."""
        return self._now.calls

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Hooks on the block's linears, removed at the end."""
        handles = [self.block.module.register_forward_pre_hook(lambda *_: self._now.begin())]
        gates = {stat.gate for stat in self._coactivations.values()}
        handles += [gate.register_forward_hook(self._keep_gate_output) for gate in gates]
        for linear in self.block.linears:
            handles.append(linear.module.register_forward_pre_hook(self._reader_of(linear)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._now.begin()

    def _keep_gate_output(self, gate: nn.Module, _args: tuple, output: Tensor) -> None:
        self._now.gate_outputs[gate] = output

    def _reader_of(self, linear: Linear) -> Callable[[nn.Module, tuple], None]:
        def read(_module: nn.Module, args: tuple) -> None:
            self.calls.append(linear.name)
            with self.timed():
                if linear.name in self._coactivations:
                    self._read_coactivation(linear, args[0])
                else:
                    self._read_sq_norm(linear, args[0])

        return read

    def _read_coactivation(self, linear: Linear, x: Tensor) -> None:
        stat = self.by_name.setdefault(linear.name, self._coactivations[linear.name])
        gate = self._now.gate_outputs.pop(stat.gate)  # a gated MLP computes its gate first
        stat.add(gate, x, self._now.deferred.pop(stat.gate, None))

    def _read_sq_norm(self, linear: Linear, x: Tensor) -> None:
        reference, shared = self._now.readers.get(id(x), (None, None))
        if reference is not None and reference() is not x:  # the address of a tensor that is gone
            shared = None
        own = self.by_name.get(linear.name)
        if own is None:
            own = self.by_name[linear.name] = shared or self._make(linear)
        if own is None or own is shared:
            return
        self._now.readers[id(x)] = (weakref.ref(x), own)
        if self.fused and any(linear.module is stat.gate for stat in self._coactivations.values()):
            self._now.deferred[linear.module] = own
        else:
            own.add(x)
