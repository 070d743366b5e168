"""What the calibration tokens say about each linear's input, gathered by forward hooks during a block's
dense pass.

Linears that read the same tensor (q, k, v; gate, up) share one statistic: the tensor's identity says so, not
a name. A gated MLP's statistics also take what its projections put out.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn

from wanda_fast.model.architecture import Block, GatedMLP, Linear
from wanda_fast.prune.coactivation import Coactivation, GatedCoactivation
from wanda_fast.prune.dense_inputs import DenseInputs, dense_inputs
from wanda_fast.prune.hessian import Hessian
from wanda_fast.prune.sharing import SharedByInput
from wanda_fast.prune.sq_norm import SquaredNorm
from wanda_kernels.forward import saving_column_squares

OfMLP = Coactivation | GatedCoactivation
Statistic = SquaredNorm | OfMLP


class _Forward(threading.local):
    """What is known of the forward at hand, one a thread."""

    def __init__(self):
        self.calls: list[str] = []
        self.outputs: dict[nn.Module, Tensor] = {}  # of gated MLPs' projections
        self.added: set[nn.Module] = set()  # projections yet to be called, whose MLP's batch is added
        self.deferred: dict[nn.Module, SquaredNorm] = {}  # gates whose norm their MLP's statistic adds
        self.entered: set[DenseInputs] = set()  # one of whose projections was called, the other not yet

    def begin(self) -> None:
        for known in (self.calls, self.outputs, self.added, self.deferred, self.entered):
            known.clear()


class _GatedStatistics:
    """The statistics of one gated MLP's linears, by name, and the projections whose outputs they read."""

    def __init__(self, mlp: GatedMLP, by_name: dict[str, OfMLP], pruned: set[nn.Linear]):
        self.mlp, self.by_name, self.pruned = mlp, by_name, pruned
        self._first, *self._others = by_name.values()
        self.reads: tuple[nn.Linear, ...] = self._first.reads

    def add(self, outputs: list[Tensor], x: Tensor, sq_norm: SquaredNorm | None) -> None:
        halves = outputs[0].chunk(2, dim=-1) if self.mlp.fused else outputs
        self._first.add(halves, x, self._others, sq_norm)


class BlockStatistics:
    """The statistics of one block's linears. `by_name[linear.name].acc` is what stands under the score's
    root, `hessians[linear.name]` the Hessian.

    Args:
        block: the block that will run.
        statistic: what to gather for a linear; None for nothing.
        hessian: makes a linear's Hessian; None: none is gathered.
        before_call: complete each linear's statistic before the linear itself is called, for it will be
            pruned then. What a statistic reads of that linear's own output, or of a later one's, is computed
            from the weights as they are: a gated MLP's two projections are both scored while both are dense,
            and so is what reads their product (`dense_inputs.py`).
        timed: makes a context around each addition.
    """

    def __init__(
        self,
        block: Block,
        statistic: Callable[[Linear], Statistic | None],
        hessian: Callable[[Linear], Hessian] | None = None,
        before_call: bool = False,
        timed: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.block, self.before_call, self.timed = block, before_call, timed
        self.complete = False  # no more inputs will come
        self._norms, self._hessians = SharedByInput(statistic), SharedByInput(hessian)
        self.by_name: dict[str, Statistic] = self._norms.by_name
        self.hessians: dict[str, Hessian] = self._hessians.by_name
        self._now = _Forward()
        self._reads_norms = any(isinstance(statistic(linear), SquaredNorm) for linear in block.linears[-1:])
        self._gated = _gated_statistics(block, statistic)
        self._dense = dense_inputs(block, statistic) if before_call else {}
        self._names = {name for gated in self._gated for name in gated.by_name} | set(self._dense)

    @property
    def calls(self) -> list[str]:
        """The linears in the order of their calls in the latest forward."""
        return self._now.calls

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Hooks on the block's linears, removed at the end."""
        handles = [self.block.module.register_forward_pre_hook(lambda *_: self._begin())]
        for linear in self.block.linears:
            handles.append(linear.module.register_forward_pre_hook(partial(self._read, linear)))
        for name, dense in self._dense.items():
            for module in dense.projections:
                handles.append(module.register_forward_pre_hook(partial(self._enter, name, dense)))
        for gated in self._gated:
            for module in gated.pruned if self.before_call else ():
                handles.append(module.register_forward_pre_hook(partial(self._add_ahead, gated)))
            for module in () if self._ahead(gated) else gated.reads:
                handles.append(module.register_forward_hook(partial(self._keep_output, gated)))
        try:
            with saving_column_squares() if self._reads_norms else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._begin()
            self.complete = True

    def _begin(self) -> None:
        for known in (self._now, self._norms, self._hessians):
            known.begin()

    def reads_output_of(self, name: str) -> bool:
        """Whether a statistic takes what this linear of the block puts out."""
        module = self.block.module.get_submodule(name.removeprefix(f"{self.block.name}."))
        return any(module in gated.reads for gated in self._gated)

    def _read(self, linear: Linear, _module: nn.Module, args: tuple) -> None:
        self.calls.append(linear.name)
        with self.timed():
            if linear.name not in self._names:
                self._read_sq_norm(linear, args[0])
            if (hessian := self._hessians.to_add(linear, args[0])) is not None:
                hessian.add(args[0])

    def _ahead(self, gated: _GatedStatistics) -> bool:
        """Whether outputs that this MLP's statistics read must be known before its projections are called."""
        return self.before_call and not gated.pruned.isdisjoint(gated.reads)

    def _add_ahead(self, gated: _GatedStatistics, module: nn.Module, args: tuple) -> None:
        if self._was_added(module):
            return
        with self.timed():
            self._add(gated, [each.forward(args[0]) for each in gated.reads], args[0])
        self._now.added.update(gated.pruned.union(gated.reads) - {module})

    def _enter(self, name: str, dense: DenseInputs, _module: nn.Module, args: tuple) -> None:
        """The first of an MLP's projections that a forward calls; both see the same input."""
        entered = self._now.entered
        if dense in entered:
            entered.remove(dense)
            return
        self.by_name[name] = dense.norm
        dense.add(args[0])
        if not dense.mlp.fused:
            entered.add(dense)

    def _was_added(self, module: nn.Module) -> bool:
        known = module in self._now.added
        self._now.added.discard(module)
        return known

    def _keep_output(self, gated: _GatedStatistics, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._was_added(module):
            return
        outputs = self._now.outputs
        overwrites = getattr(gated.mlp.activation, "inplace", False) and module is not gated.reads[-1]
        outputs[module] = output.clone() if overwrites else output
        if all(each in outputs for each in gated.reads):
            with self.timed():
                self._add(gated, [outputs.pop(each) for each in gated.reads], args[0])
            self._now.added.update(gated.pruned if self.before_call else ())

    def _add(self, gated: _GatedStatistics, outputs: list[Tensor], x: Tensor) -> None:
        self.by_name.update(gated.by_name)
        gated.add(outputs, x, self._now.deferred.pop(gated.mlp.gate, None))

    def _read_sq_norm(self, linear: Linear, x: Tensor) -> None:
        own = self._norms.to_add(linear, x)
        if own is None:
            return
        if not self.before_call and any(linear.module is gated.mlp.gate for gated in self._gated):
            self._now.deferred[linear.module] = own
        else:
            own.add(x)


def _gated_statistics(
    block: Block, statistic: Callable[[Linear], Statistic | None]
) -> list[_GatedStatistics]:
    by_mlp: dict[GatedMLP, tuple[dict[str, OfMLP], set[nn.Linear]]] = {}
    for linear in block.linears:
        if linear.gated is not None and isinstance(own := statistic(linear), OfMLP):
            by_name, pruned = by_mlp.setdefault(linear.gated, ({}, set()))
            by_name[linear.name] = own
            pruned.add(linear.module)
    return [_GatedStatistics(mlp, *of_mlp) for mlp, of_mlp in by_mlp.items()]
