"""`--sequential linear`: one pass over a block; each linear is pruned as soon as its input is known.

Every batch runs through the block in a thread of its own; one thread runs at a time. Before each linear a
batch waits until all other batches have reached it. Then the linear is pruned, and the batches continue:
later modules see the output of pruned weights, and every product is computed once.

On a GPU, attention is computed by the main thread on behalf of the batches, because cuDNN plans it anew in
every thread, which takes 70 ms each.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.model.architecture import Block, Stage
from wanda_fast.model.block_inputs import BlockCall, BlockInputs
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.selection import Selection, prune_block
from wanda_fast.pruning.turn import Turn
from wanda_fast.report.contents import LinearReport
from wanda_fast.timer import Clock


class SequentialLinear:
    """The three steps of the loop, of which the second is the whole pass."""

    def __init__(self, selection: Selection, clock: Clock):
        self.selection, self.clock = selection, clock

    def dense_pass(self, turn: Turn) -> BlockStatistics:
        """Runs nothing: the statistics are gathered as the linears are pruned."""
        return self.selection.statistics(turn.block, self.clock, before_call=True)

    def prune(self, turn: Turn, statistics: BlockStatistics) -> dict[str, LinearReport]:
        """Prunes each linear once its input is known. `turn.inputs` become the next block's."""
        block, reports = turn.block, {}
        forwards = [
            partial(_advance_batch, block, turn.inputs, batch, call)
            for batch, call in turn.inputs.batches(turn.index)
        ]

        def prune(linears: list[Linear]) -> None:
            with self.clock.phase("selection"):
                part = replace(block, linears=linears)
                reports.update(prune_block(part, self.selection, statistics, turn.phases))

        with turn.phases("one pass"), statistics.gathering():
            run_in_lockstep(block, forwards, prune, self.selection.ranks)
        if unseen := [linear for linear in block.linears if linear.name not in reports]:
            prune(unseen)
        return {linear.name: reports[linear.name] for linear in block.linears}

    def pruned_pass(self, turn: Turn) -> None:
        """Runs nothing: the one pass went through pruned weights."""


def _advance_batch(block: Block, inputs: BlockInputs, batch: slice, call: BlockCall) -> None:
    inputs.hidden[batch] = call.run(block.module, inputs.hidden[batch])


class _Stop(BaseException):
    """Ends a waiting batch after another one failed."""


class _Batch:
    """One batch on its way through the block. `at`: the stage that it waits for; None at the end."""

    def __init__(
        self, forward: Callable[[], None], on_gpu: bool, modes: Callable[[], AbstractContextManager]
    ):
        self.at: Stage | None = None
        self.error: BaseException | None = None
        self._forward, self._modes, self._stopped = forward, modes, False
        self._asked: Callable[[], object] | None = None
        self._elsewhere = _AttentionElsewhere(self) if on_gpu else nullcontext()
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        own = partial(copy_context().run, self._run)
        self.thread = threading.Thread(target=own, name="wanda-fast-batch", daemon=True)
        self.thread.start()

    def go_on(self) -> None:
        """Let the batch run until it waits again, and compute what it asks for meanwhile."""
        self._wake()
        while self._asked is not None:
            self._answer, self._asked = self._asked(), None
            self._wake()
        if self.error is not None:
            raise self.error

    def ask(self, compute: Callable[[], object]) -> object:
        """Called in the batch's own thread: returns what the main thread computes."""
        self._asked = compute
        self._pause()
        answer, self._answer = self._answer, None
        return answer

    def wait_for(self, stage: Stage) -> None:
        """Called in the batch's own thread."""
        self.at = stage
        self._pause()

    def stop(self) -> None:
        self._stopped = True
        self._go.release()
        self.thread.join()

    def _wake(self) -> None:
        self._go.release()
        self._waits.acquire()

    def _pause(self) -> None:
        self._waits.release()
        self._go.acquire()
        if self._stopped:
            raise _Stop

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._stopped:
                with self._modes(), self._elsewhere:
                    self._forward()
        except _Stop:
            pass
        except BaseException as error:  # noqa: B902  (the main thread raises it again)
            self.error = error
        self.at = None
        self._waits.release()


class _AttentionElsewhere(TorchFunctionMode):
    """In a batch's thread: attention is computed by the main thread."""

    def __init__(self, batch: _Batch):
        super().__init__()
        self._batch = batch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        compute = partial(func, *args, **(kwargs or {}))
        return self._batch.ask(compute) if func is F.scaled_dot_product_attention else compute()


def _on_gpu(block: Block) -> bool:
    return any(parameter.is_cuda for parameter in block.module.parameters())


def _callers_modes(device: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts that give a new thread this thread's inference mode and autocast, and no gradients."""
    inference = torch.is_inference_mode_enabled()
    autocast = dict(enabled=torch.is_autocast_enabled(device), dtype=torch.get_autocast_dtype(device))

    @contextmanager
    def modes() -> Iterator[None]:
        # Autocast's copies of weights would be dense.
        cast = torch.autocast(device, cache_enabled=False, **autocast)
        with torch.inference_mode(inference), torch.no_grad(), cast:
            yield

    return modes


def run_in_lockstep(
    block: Block, forwards: list[Callable[[], None]], prune: Callable[[list[Linear]], None], ranks: Ranks
) -> None:
    """Run all `forwards` of the block, and call `prune` with a stage's linears once every one has reached it,
    on all ranks.

    If batches wait for different stages, the first one in the block's order is pruned first.
    """
    on_gpu = _on_gpu(block)
    modes = _callers_modes("cuda" if on_gpu else "cpu")
    batches = [_Batch(forward, on_gpu, modes) for forward in forwards]
    of_thread = {batch.thread.ident: batch for batch in batches}
    order = {stage: index for index, stage in enumerate(block.stages)}
    pruned: set[Stage] = set()

    def waiting_before(stage: Stage):
        def wait(*_: object) -> None:
            if stage not in pruned:
                of_thread[threading.get_ident()].wait_for(stage)

        return wait

    handles = [stage.module.register_forward_pre_hook(waiting_before(stage)) for stage in block.stages]
    try:
        for batch in batches:
            batch.go_on()
        ended = len(block.stages)
        while True:
            waiting = [batch for batch in batches if batch.at is not None]
            first = ranks.least(min((order[batch.at] for batch in waiting), default=ended))
            if first == ended:
                break
            stage = block.stages[first]
            prune(stage.linears)
            pruned.add(stage)
            for batch in waiting:
                if batch.at is stage:
                    batch.go_on()
    finally:
        for batch in batches:
            batch.stop()
        for handle in handles:
            handle.remove()
