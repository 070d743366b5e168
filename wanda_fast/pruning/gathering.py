"""Gathers a block's statistics and Hessians by forward hooks while the calibration runs through it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial

from torch import Tensor, nn

from wanda_fast.model.architecture import Block
from wanda_fast.model.experts import ExpertLinear, Experts, Projection
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.expert_statistics import ExpertOptions, ExpertStatistics
from wanda_fast.pruning.expert_sums import ExpertSums
from wanda_fast.pruning.hessian import Hessian
from wanda_fast.pruning.shared_by_input import SharedByInput
from wanda_fast.pruning.statistics import DenseInputs, OutputStatistic, SquaredNorm, Statistic
from wanda_kernels.forward import saving_column_squares


class _Forward(threading.local):
    """The state of this thread's forward."""

    def __init__(self):
        self.calls: list[str] = []
        # Outputs of modules that statistics read.
        self.outputs: dict[nn.Module, Tensor] = {}
        # Modules yet to be called, whose group has this batch already.
        self.added: set[nn.Module] = set()
        # Norms that a group adds as it reads x, by the module whose input they are of.
        self.deferred: dict[nn.Module, SquaredNorm] = {}
        # MLPs of which one projection was called, and the other not yet.
        self.entered: set[DenseInputs] = set()

    def begin(self) -> None:
        for known in (self.calls, self.outputs, self.added, self.deferred, self.entered):
            known.clear()


class _Group:
    """Statistics of one class that read the same outputs, and are added together."""

    def __init__(self, linears: list[Linear], statistics: list[OutputStatistic]):
        self.by_name = {linear.name: own for linear, own in zip(linears, statistics, strict=True)}
        self.pruned: set[nn.Module] = {linear.module for linear in linears}
        self.first, *self._others = statistics
        self.reads = self.first.reads

    def add(self, x: Tensor, outputs: list[Tensor], sq_norm: SquaredNorm | None) -> None:
        self.first.add_outputs(x, outputs, self._others, sq_norm)


class BlockStatistics:
    """The statistics of one block's linears.

    `by_name[linear.name].acc` is the statistic, `hessians[linear.name]` the Hessian. A linear that received
    no token is in neither. `without` names the linears for which the method has no statistic.

    Args:
        block: the block that will run.
        statistic: makes a linear's statistic; None for a linear that has none.
        hessian: makes a linear's Hessian; None: none is gathered.
        before_call: complete a linear's statistic before the linear is called, because it will be pruned
            then. Outputs that a statistic reads are computed ahead, by weights that are still dense: a gated
            MLP's two projections are both scored while both are dense, and so is the down projection behind
            them (`DenseInputs`).
        timed: makes a context around each addition.
        before: sequences and tokens of the calibration that other ranks have before this one's.
    """

    def __init__(
        self,
        block: Block,
        statistic: Callable[[Linear], Statistic | None],
        hessian: Callable[[Linear], Hessian] | None = None,
        before_call: bool = False,
        timed: Callable[[], AbstractContextManager] = nullcontext,
        expert_options: ExpertOptions = ExpertOptions(),  # noqa: B008  (it is frozen)
        before: tuple[int, int] = (0, 0),
    ):
        self.block, self.before_call, self.timed = block, before_call, timed
        # Set when no more inputs will come.
        self.complete = False
        made = {linear.name: statistic(linear) for linear in block.dense}
        self.without = {name for name, own in made.items() if own is None}
        self.shared_statistics = SharedByInput(
            lambda linear: made[linear.name], lambda linear: type(made[linear.name])
        )
        self.shared_hessians = SharedByInput(hessian or (lambda _: None), lambda _: Hessian)
        self.by_name: dict[str, Statistic] = self.shared_statistics.by_name
        self.hessians: dict[str, Hessian] = self.shared_hessians.by_name
        # Those that are sums over all ranks by now.
        self.summed: set[Statistic | Hessian] = set()
        self._now = _Forward()
        self._groups = _groups(block, made)
        self._dense = _dense_inputs(block, made, before) if before_call else {}
        self._elsewhere = {name for group in self._groups for name in group.by_name} | set(self._dense)
        last = [made[linear.name] for linear in block.dense[-1:]]
        self._wants_squares = any(own is not None and own.reads_column_squares for own in last)
        self.experts = [
            ExpertStatistics(
                each,
                _linears_of(each, block),
                statistic,
                hessian,
                expert_options,
                before_call,
                timed,
                before[1],
            )
            for each in block.experts
            if _linears_of(each, block)
        ]
        for name, own, expert_hessian in (held for each in self.experts for held in each.named()):
            if own is None:
                self.without.add(name)
            else:
                self.by_name[name] = own
            if expert_hessian is not None:
                self.hessians[name] = expert_hessian

    @property
    def calls(self) -> list[str]:
        """The stages in the order of their calls in the latest forward."""
        return self._now.calls

    def expert_sums(self) -> dict[Projection, dict[str, ExpertSums]]:
        """The statistics of every projection of experts, by part."""
        projections = [sums for each in self.experts for sums in (each.first, each.down)]
        return {sums.projection: sums.by_part for sums in projections}

    def tokens(self) -> dict[str, int]:
        """The calibration tokens that each linear of an expert has seen so far."""
        return {name: count for each in self.experts for name, count in each.tokens().items()}

    def shared(self) -> "BlockStatistics":
        """The same statistics for another setting: `forget_hessian` leaves the others theirs."""
        other = copy(self)
        other.hessians = dict(self.hessians)
        return other

    def forget_hessian(self, name: str) -> None:
        """Drop the Hessian of a pruned linear; the last one that shares it frees what solvers made of it."""
        hessian = self.hessians.pop(name, None)
        if hessian is not None and hessian not in self.hessians.values():
            hessian.release()

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Hooks on the block's modules, removed at the end."""
        handles = [self.block.module.register_forward_pre_hook(lambda *_: self._begin())]
        for linear in self.block.dense:
            handles.append(linear.module.register_forward_pre_hook(partial(self._read, linear)))
        for stage in self.block.stages:
            handles.append(stage.module.register_forward_pre_hook(partial(self._note, stage.name)))
        for each in self.experts:
            handles += each.hooks()
        for name, dense in self._dense.items():
            for module in dense.projections:
                handles.append(module.register_forward_pre_hook(partial(self._enter, name, dense)))
        for group in self._groups:
            for module in group.pruned if self.before_call else ():
                handles.append(module.register_forward_pre_hook(partial(self._add_ahead, group)))
            for module in () if self._computed_ahead(group) else group.reads:
                handles.append(module.register_forward_hook(partial(self._keep_output, group)))
        try:
            with saving_column_squares() if self._wants_squares else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._begin()
            self.complete = True

    def reads_output_of(self, module: nn.Module) -> bool:
        """Whether a statistic reads the output of this module."""
        of_experts = any(module is each.first.projection and each.first.reads_output for each in self.experts)
        return of_experts or any(module in group.reads for group in self._groups)

    def _note(self, name: str, *_: object) -> None:
        self.calls.append(name)

    def _begin(self) -> None:
        for known in (self._now, self.shared_statistics, self.shared_hessians):
            known.begin()

    def _read(self, linear: Linear, _module: nn.Module, args: tuple) -> None:
        with self.timed():
            if linear.name not in self._elsewhere:
                self._read_input(linear, args[0])
            if (hessian := self.shared_hessians.to_add(linear, args[0])) is not None:
                hessian.add(linear.rows(args[0]))

    def _read_input(self, linear: Linear, x: Tensor) -> None:
        own = self.shared_statistics.to_add(linear, x)
        if own is None:
            return
        joins = any(linear.module is group.first.norm_of for group in self._groups)
        if joins and not self.before_call and isinstance(own, SquaredNorm):
            self._now.deferred[linear.module] = own
        else:
            own.add(linear.rows(x))

    def _computed_ahead(self, group: _Group) -> bool:
        """Whether outputs that the group reads must be known before the modules themselves are called."""
        return self.before_call and not group.pruned.isdisjoint(group.reads)

    def _add_ahead(self, group: _Group, module: nn.Module, args: tuple) -> None:
        if self._was_added(module):
            return
        with self.timed():
            self._add(group, [each.forward(args[0]) for each in group.reads], args[0])
        self._now.added.update(group.pruned.union(group.reads) - {module})

    def _enter(self, name: str, dense: DenseInputs, _module: nn.Module, args: tuple) -> None:
        """The first of an MLP's projections that a forward calls adds; both see the same input."""
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

    def _keep_output(self, group: _Group, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._was_added(module):
            return
        outputs = self._now.outputs
        outputs[module] = group.first.kept(module, output)
        if all(each in outputs for each in group.reads):
            with self.timed():
                self._add(group, [outputs.pop(each) for each in group.reads], args[0])
            self._now.added.update(group.pruned if self.before_call else ())

    def _add(self, group: _Group, outputs: list[Tensor], x: Tensor) -> None:
        self.by_name.update(group.by_name)
        group.add(x, outputs, self._now.deferred.pop(group.first.norm_of, None))


def _linears_of(experts: Experts, block: Block) -> list[ExpertLinear]:
    held = set(block.linears)
    return [linear for linear in experts.linears if linear in held]


def _groups(block: Block, made: dict[str, Statistic | None]) -> list[_Group]:
    grouped: dict[tuple, list[Linear]] = {}
    for linear in block.dense:
        if isinstance(own := made[linear.name], OutputStatistic):
            grouped.setdefault((type(own), own.reads), []).append(linear)
    return [_Group(linears, [made[linear.name] for linear in linears]) for linears in grouped.values()]


def _dense_inputs(
    block: Block, made: dict[str, Statistic | None], before: tuple[int, int]
) -> dict[str, DenseInputs]:
    """By the name of each down projection, scored by its input alone, behind a gate or up that is pruned."""
    mlps = {linear.gated.down: linear.gated for linear in block.dense if linear.gated is not None}
    found = {}
    for linear in block.dense:
        mlp, own = mlps.get(linear.module), made[linear.name]
        if mlp is not None and own is not None and not isinstance(own, OutputStatistic):
            found[linear.name] = DenseInputs(mlp, own, before)
    return found
