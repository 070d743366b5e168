"""Gathers the statistics and Hessians of a block's experts, from tokens sorted by expert.

An expert that sees few tokens has noisy statistics: they are drawn towards those of all tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import OptionError
from wanda_fast.model.experts import ExpertLinear, Experts
from wanda_fast.pruning.expert_sums import Make, ProjectionSums, weighted
from wanda_fast.pruning.hessian import Hessian
from wanda_fast.pruning.statistics import Statistic
from wanda_fast.report.contents import STARVED_TOKENS

# Evenly spaced tokens that stand for all; the sample has between this many and twice as many.
SAMPLE_TOKENS = 1024


@dataclass(frozen=True)
class ExpertOptions:
    """How the statistics of experts count tokens.

    Attributes:
        shrinkage: TAU: a starved expert's mean over its n tokens becomes (n * mean + TAU * m) / (n + TAU),
            where m is the mean if all tokens went through the expert; 0: it stays as it is.
        tokens: "routed": each expert's own tokens; "all": every token goes through every expert, for the
            statistics alone.
        weighting: "none", or "router": a token counts by the square of the router's weight.
    """

    shrinkage: float = 0.0
    tokens: str = "routed"
    weighting: str = "none"

    def __post_init__(self):
        if not (isinstance(self.shrinkage, int | float) and 0 <= self.shrinkage < math.inf):
            raise OptionError(f"expert_shrinkage must be a number from 0 on, got {self.shrinkage!r}")


class ExpertStatistics:
    """The statistics of one module's experts.

    Attributes:
        counts: tokens of each expert, int64 `[experts]`.
    """

    def __init__(
        self,
        experts: Experts,
        linears: list[ExpertLinear],
        statistic: Make,
        hessian: Make | None,
        options: ExpertOptions,
        before_call: bool,
        timed: Callable[[], AbstractContextManager],
        tokens_before: int = 0,
    ):
        self.experts, self.options = experts, options
        self._takes_all = options.tokens == "all" and experts.sees_all
        # The down projections are scored before they are called, while the first ones are dense.
        self._ahead = before_call and experts.hidden is not None
        self._linears, self._make = linears, (statistic, hessian)
        self.first, self.down = self._sums(linears)
        device = experts.down.stack.device
        self.counts = torch.zeros(experts.count, dtype=torch.int64, device=device)
        self._sample = TokenSample(tokens_before)
        self._timed = partial(_timed, timed)
        self._weight = torch.zeros((), device=device)
        self._finished = False

    def hooks(self) -> list:
        experts = self.experts
        handles = [
            experts.module.register_forward_pre_hook(self._timed(self._see_tokens)),
            experts.first.register_forward_pre_hook(self._timed(self._before_first)),
            experts.down.register_forward_pre_hook(self._timed(self._before_down)),
        ]
        if self.first.reads_output and not self._ahead:
            handles.append(experts.first.register_forward_hook(self._timed(self._after_first)))
        return handles

    def tokens(self) -> dict[str, int]:
        """The tokens that each linear's expert has seen."""
        counts = self.counts.tolist()
        return {linear.name: counts[linear.index] for linear in self._linears}

    def finish(self, ranks: Ranks) -> None:
        """Draw the statistics of starved experts towards those of all tokens, once all were seen.

        With several ranks the first one does it, before their statistics are summed.
        """
        if self._finished:
            return
        self._finished = True
        ranks.sum_([self.counts, self._weight])
        if self.options.shrinkage and not self._takes_all:
            sample = TokenSample.of(ranks.gather(self._sample.on_host() if ranks.size > 1 else self._sample))
            if ranks.is_first and sample is not None:
                self._draw_towards(sample.to(self.counts.device))

    def _draw_towards(self, sample: Tensor) -> None:
        tau = self.options.shrinkage
        mean = 1.0
        if self.options.weighting == "router":
            mean = float(self._weight / self.counts.sum().clamp(min=1))
        for expert, count in enumerate(self.counts.tolist()):
            own = [linear for linear in self._linears if linear.index == expert]
            if count < STARVED_TOKENS and own:
                sums = self._sums(own, joins=False)
                self._add_all(sums, sample, expert)
                for held, added in zip((self.first, self.down), sums, strict=True):
                    held.shrink_(added, tau * mean / len(sample))

    def named(self) -> Iterator[tuple[str, Statistic | None, Hessian | None]]:
        """(name, statistic, Hessian) of each matrix."""
        yield from self.first.named()
        yield from self.down.named()

    def _sums(self, linears: list[ExpertLinear], joins: bool = True) -> tuple[ProjectionSums, ProjectionSums]:
        first, down = self.experts.first, self.experts.down
        return tuple(
            ProjectionSums(each, [linear for linear in linears if linear.module is each], *self._make, joins)
            for each in (first, down)
        )

    def _see_tokens(self, _module: nn.Module, args: tuple) -> None:
        x = args[0]
        if self._takes_all:
            for expert in range(self.experts.count):
                self._add_all((self.first, self.down), x, expert)
        elif self.options.shrinkage and self.experts.sees_all:
            self._sample.see(x)

    def _add_all(self, sums: tuple[ProjectionSums, ProjectionSums], x: Tensor, expert: int) -> None:
        """Send all of x through one expert, for `sums`."""
        first, down = sums
        offsets = torch.zeros(self.experts.count + 1, dtype=torch.int64, device=x.device)
        offsets[expert + 1 :] = len(x)
        output = self.experts.first.forward(x, offsets, None)
        hidden = self.experts.hidden(output)
        for each, values in ((first, x), (down, hidden)):
            each.add_input(values, offsets)
            each.add_hessian(values, offsets)
        first.add_output(x, output, offsets)

    def _before_first(self, _module: nn.Module, args: tuple) -> None:
        x, offsets, weights = args
        self.counts += self.experts.tokens(x, offsets)
        if weights is not None:
            self._weight += weights.float().square().sum()
        if self._takes_all:
            return
        weights = self._counting(weights)
        counted = weighted(x, weights)
        self.first.add_input(counted, offsets)
        self.first.add_hessian(counted, offsets)
        if self._ahead:
            output = self.experts.first.forward(x, offsets, weights)
            self.first.add_output(x, output, offsets, weights)
            self.down.add_input(weighted(self.experts.hidden(output), weights), offsets)

    def _after_first(self, _module: nn.Module, args: tuple, output: Tensor) -> None:
        x, offsets, weights = args
        if not self._takes_all:
            self.first.add_output(x, output, offsets, self._counting(weights))

    def _before_down(self, _module: nn.Module, args: tuple) -> None:
        hidden, offsets, weights = args
        if self._takes_all:
            return
        hidden = weighted(hidden, self._counting(weights))
        if not self._ahead:
            self.down.add_input(hidden, offsets)
        self.down.add_hessian(hidden, offsets)

    def _counting(self, weights: Tensor | None) -> Tensor | None:
        return weights if self.options.weighting == "router" else None


def _timed(timed: Callable[[], AbstractContextManager], hook: Callable[..., None]) -> Callable[..., None]:
    def run(*args: object) -> None:
        with timed():
            hook(*args)

    return run


class TokenSample:
    """Evenly spaced tokens of all that were seen; which ones does not depend on the batches.

    Attributes:
        tokens: `[tokens, features]`; None: none was seen.
    """

    def __init__(self, before: int = 0):
        """
        Args:
            before: tokens that other ranks have before this one's.
        """
        self.tokens: Tensor | None = None
        self._before, self._seen, self._every = before, before, 1

    @staticmethod
    def of(samples: "list[TokenSample]") -> Tensor | None:
        """The sample that one process would have, from those of all ranks."""
        seen = [sample for sample in samples if sample.tokens is not None]
        every = max((sample._every for sample in seen), default=1)
        while seen and sum(len(sample._thinned(every)) for sample in seen) >= 2 * SAMPLE_TOKENS:
            every *= 2
        return torch.cat([sample._thinned(every) for sample in seen]) if seen else None

    def _thinned(self, every: int) -> Tensor:
        """Those tokens whose place among all ranks' is a multiple of `every`, itself one of `_every`."""
        first = -(-self._before // self._every) * self._every
        return self.tokens[-first % every // self._every :: every // self._every]

    def on_host(self) -> "TokenSample":
        moved = copy(self)
        moved.tokens = None if self.tokens is None else self.tokens.cpu()
        return moved

    def see(self, x: Tensor) -> None:
        part = x[-self._seen % self._every :: self._every]
        self._seen += len(x)
        self.tokens = part.clone() if self.tokens is None else torch.cat([self.tokens, part])
        while len(self.tokens) >= 2 * SAMPLE_TOKENS:
            self.tokens, self._every = self._thinned(2 * self._every).clone(), 2 * self._every
