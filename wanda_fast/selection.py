"""Selection: every linear of a block pruned by its statistics, judged first, timed and counted."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import wanda_kernels
from wanda_fast.architecture import Block, Linear
from wanda_fast.errors import NonFiniteError
from wanda_fast.masks import empty_mask
from wanda_fast.methods import Method
from wanda_fast.patterns import Pattern
from wanda_fast.report import LinearReport
from wanda_fast.statistics import BlockStatistics
from wanda_kernels.backends import TABLE, choose

logger = logging.getLogger(__name__)


def prune_block(
    block: Block,
    method: Method,
    pattern: Pattern,
    statistics: BlockStatistics | None,
    tell: Callable[..., None],
    masks: dict[str, Tensor] | None,
) -> dict[str, LinearReport]:
    scales = {linear.name: _scale(linear, statistics) for linear in block.linears}
    _require_finite(block, scales)
    watch = _Stopwatch(block.linears[0].module.weight.device) if block.linears else None
    operations, zeros = [], []
    for linear in block.linears:
        tell("selection", linear.name)
        weight = linear.module.weight.data
        mask = None if masks is None else empty_mask(weight)
        with watch.lap():
            operations.append(method.prune_(weight, scales[linear.name], pattern, mask))
        if masks is not None:
            masks[linear.name] = mask.cpu()
        zeros.append((weight == 0).sum())
    counts = torch.stack(zeros).tolist() if zeros else []  # waits for the device once a block
    seconds = watch.seconds() if watch else []
    return {
        linear.name: _report(linear, zero, lap, operation, statistics)
        for linear, operation, zero, lap in zip(block.linears, operations, counts, seconds, strict=True)
    }


def _report(
    linear: Linear, zeros: int, seconds: float, operation: str, statistics: BlockStatistics | None
) -> LinearReport:
    device, weights = linear.module.weight.device.type, linear.module.weight.numel()
    gathered = statistics.by_name.get(linear.name) if statistics else None
    return LinearReport(
        sparsity=zeros / max(weights, 1),
        weights=weights,
        seconds=seconds,
        operation=operation,
        backend=choose(operation, device) if operation in TABLE else "torch",
        statistic=gathered and gathered.operation,
        statistic_backend=gathered and choose(gathered.operation, device),
    )


class _Stopwatch:
    """Seconds of each lap; on a GPU by events, so that no lap waits for the device."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple] = []

    @contextmanager
    def lap(self) -> Iterator[None]:
        begin = self._mark()
        yield
        self.marks.append((begin, self._mark()))

    def seconds(self) -> list[float]:
        """After the device was waited for."""
        if self.on_gpu:
            return [begin.elapsed_time(end) / 1000 for begin, end in self.marks]
        return [end - begin for begin, end in self.marks]

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _scale(linear: Linear, statistics: BlockStatistics | None) -> Tensor | None:
    if statistics is None:
        return None
    if linear.name not in statistics.by_name:
        logger.warning("%s saw no calibration token; its scores are all zero", linear.name)
        return torch.zeros(linear.module.in_features, device=linear.module.weight.device)
    return statistics.by_name[linear.name].acc


def _require_finite(block: Block, scales: dict[str, Tensor | None]) -> None:
    """One verdict a block, before any of its weights is touched."""
    operands = {f"{linear.name}.weight": linear.module.weight.data for linear in block.linears}
    operands |= {f"{name}: input statistics, as a scale": scale for name, scale in scales.items()}
    try:
        wanda_kernels.require_finite(operands)
    except ValueError as error:
        raise NonFiniteError(f"block {block.name}: {error}") from error
