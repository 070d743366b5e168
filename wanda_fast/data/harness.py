"""lm-evaluation-harness on a model in memory. To import this module takes seconds: it imports the harness."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from lm_eval.api import model as harness_model
from lm_eval.api import task as harness_task
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from wanda_fast.model.block_forward import faster_forward
from wanda_fast.model.fused_modules import fused_modules
from wanda_kernels.forward import reused_memory

# More are not faster, because a task's sequences are short.
TOKENS_PER_FORWARD = 2048
# Modules of the harness that draw progress bars.
BARS = (harness_model, harness_task, huggingface)
# A context's tokens and those of a continuation, whose probability is wanted.
Pair = tuple[list[int], list[int]]


class LanguageModel(HFLM):
    """The harness's own adapter of a transformers model, with other batches.

    A batch has sequences of about the same length, TOKENS_PER_FORWARD tokens in all, and logits are computed
    of the continuations alone.

    Args:
        progress: called after each forward with the number of continuations done, and of all.
    """

    def __init__(self, model: nn.Module, tokenizer, progress: Callable[[int, int], None]):
        # The harness gives a tokenizer without a padding token one.
        super().__init__(pretrained=model, tokenizer=deepcopy(tokenizer))
        self._progress = progress

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs=None) -> list:
        """(log-likelihood, whether each of its tokens has the highest logit) of each continuation."""
        pairs = [self._shortened(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda index: -_length(pairs[index]))
        found, done = {}, 0
        for batch in _batches(order, pairs):
            found |= zip(batch, self._scores([pairs[index] for index in batch]), strict=True)
            done += len(batch)
            self._progress(done, len(pairs))
        return [found[index] for index in range(len(pairs))]

    def _shortened(self, context: list[int], continuation: list[int]) -> Pair:
        """The end of a context that is too long for the model. Its last token needs no place."""
        room = self.max_length + 1 - len(continuation)
        return context[-room:] if room > 0 else context[:0], continuation

    def _scores(self, batch: list[Pair]) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[:-1] for context, continuation in batch]
        width = max(map(len, rows))
        # The rows' ends are filled with zeros, which the tokens before them do not see.
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        first = min(len(context) - 1 for context, _ in batch)
        logits = self._logits(input_ids, width - first)
        scores = []
        for (context, continuation), row in zip(batch, logits, strict=True):
            begin, target = len(context) - 1 - first, torch.tensor(continuation, device=self.device)
            own = row[begin : begin + len(continuation)].float()
            likelihood = -F.cross_entropy(own, target, reduction="sum").item()
            scores.append((likelihood, torch.equal(own.argmax(dim=-1), target)))
        return scores

    @torch.no_grad()
    def _logits(self, input_ids: Tensor, last: int) -> Tensor:
        """Logits `[rows, last, vocabulary]` of the last positions."""
        options = {"logits_to_keep": last} if _can_keep(self.model) else {}
        with faster_forward(input_ids.device), fused_modules(self.model), reused_memory():
            return self.model(input_ids, use_cache=False, **options).logits[:, -last:]


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _batches(order: list[int], pairs: list[Pair]) -> Iterator[list[int]]:
    """Parts of `order`, which begins with the longest pair."""
    while order:
        count = max(1, TOKENS_PER_FORWARD // _length(pairs[order[0]]))
        yield order[:count]
        order = order[count:]


def _can_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _undrawn(bar: type, *args: object, **options: object) -> object:
    return bar(*args, **options | {"disable": True})


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which the harness draws no progress bars of its own, and logs errors alone."""
    bars, logger = [module.tqdm for module in BARS], logging.getLogger("lm_eval")
    level = logger.level
    for module, bar in zip(BARS, bars, strict=True):
        module.tqdm = partial(_undrawn, bar)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for module, bar in zip(BARS, bars, strict=True):
            module.tqdm = bar
        logger.setLevel(level)
