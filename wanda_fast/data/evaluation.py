"""Perplexity as the published code computes it, and zero-shot accuracy through lm-evaluation-harness."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_fast.data.calibration import require_tokenizer, tokenize
from wanda_fast.data.text import evaluation_text
from wanda_fast.errors import CalibrationError, MissingDependencyError
from wanda_fast.model.block_forward import faster_forward
from wanda_fast.model.fused_modules import fused_modules
from wanda_kernels.forward import reused_memory

ZERO_SHOT_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TOKENS_PER_FORWARD = 4096  # logits are [tokens, vocabulary]: 4096 x 128 k in fp32 is 2 GiB


@dataclass
class EvaluationSet:
    """What a perplexity is measured on: `windows` int64 `[nwindows, seqlen]`, and the protocol in words."""

    windows: Tensor
    label: str

    @property
    def protocol(self) -> str:
        nwindows, seqlen = self.windows.shape
        return f"{self.label}, {nwindows} windows of {seqlen}, {nwindows * seqlen} tokens"


def evaluation_set(
    dataset: str | Tensor,
    tokenizer,
    seqlen: int,
    max_windows: int | None = None,
    cache_dir: str | None = None,
) -> EvaluationSet:
    """Non-overlapping windows of seqlen from the start of the text; the rest is dropped.

    Args:
        dataset: a name or path that `text.evaluation_text` knows, or token ids of any shape, read as one
            text.
        max_windows: take at most so many.
    """
    if isinstance(dataset, Tensor):
        ids, label = dataset.flatten().long(), "token ids"
    else:
        require_tokenizer(tokenizer, dataset)
        text = evaluation_text(dataset, cache_dir)
        ids, label = tokenize(tokenizer, text.documents[0]), text.label
    nwindows = len(ids) // seqlen
    if not nwindows:
        raise CalibrationError(
            f"evaluation text {label} has {len(ids)} tokens, fewer than one window of {seqlen}"
        )
    nwindows = min(nwindows, max_windows or nwindows)
    return EvaluationSet(ids[: nwindows * seqlen].view(nwindows, seqlen), label)


def perplexity(
    model: nn.Module,
    data: str | Tensor | EvaluationSet,
    seqlen: int = 2048,
    *,
    tokenizer=None,
    max_windows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> float:
    """exp of the mean over windows of the mean loss over each window's seqlen - 1 predictions.

    Args:
        model: a causal LM that returns `.logits`.
        data: token ids, an `EvaluationSet`, or a dataset name or file (which needs `tokenizer`).
        progress: called with the number of windows done after each forward.
    Source: the published Wanda's `lib/eval.py`.
    """
    if not isinstance(data, EvaluationSet):
        data = evaluation_set(data, tokenizer, seqlen, max_windows)
    device, batch, losses = next(model.parameters()).device, batch_of(data), []
    for done, windows in enumerate(data.windows.split(batch), start=1):
        losses += window_losses(model, windows.to(device))
        if progress:
            progress(min(done * batch, len(data.windows)))
    return mean_perplexity(losses)


def batch_of(data: EvaluationSet) -> int:
    """Windows a forward."""
    return max(1, TOKENS_PER_FORWARD // data.windows.shape[1])


def mean_perplexity(losses: list[float]) -> float:
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor) -> list[float]:
    """The mean loss of each window `[seqlen]` of `windows` `[nwindows, seqlen]`."""
    with faster_forward(windows.device), fused_modules(model), reused_memory():
        logits = model(windows, use_cache=False).logits
    return [
        F.cross_entropy(row[:-1].float(), ids[1:]).item() for row, ids in zip(logits, windows, strict=True)
    ]  # fp32 of one window at a time


def require_zero_shot() -> None:
    """Raise `MissingDependencyError` where lm-evaluation-harness is absent: before the work, not after it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "--eval_zero_shot needs lm-evaluation-harness, which is absent: pip install 'wanda_fast[eval]'"
        )


def zero_shot(model: nn.Module, tokenizer, tasks: tuple[str, ...] = ZERO_SHOT_TASKS) -> dict[str, dict]:
    """Results by task name, from lm-evaluation-harness (the `eval` extra)."""
    require_zero_shot()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    return simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))["results"]
