"""Perplexity as the published code computes it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_fast.data.calibration import log_warning, require_tokenizer, tokenize
from wanda_fast.data.given import given_text, ids_or_rows, require_ids
from wanda_fast.data.text import evaluation_text
from wanda_fast.errors import CalibrationError
from wanda_fast.model.block_forward import faster_forward
from wanda_fast.model.fused_modules import fused_modules
from wanda_kernels.forward import reused_memory

# Logits are [tokens, vocabulary]: with a vocabulary of 128 k, 4096 tokens take 2 GiB in fp32.
TOKENS_PER_FORWARD = 4096


@dataclass
class EvaluationSet:
    """The data that perplexity is measured on.

    Attributes:
        windows: int64 `[nwindows, seqlen]`.
        label: name of the text.
    """

    windows: Tensor
    label: str

    @property
    def protocol(self) -> str:
        """The data in words, for the report."""
        nwindows, seqlen = self.windows.shape
        return f"{self.label}, {nwindows} windows of {seqlen}, {nwindows * seqlen} tokens"


def evaluation_set(
    dataset: str | Path | Tensor | Iterable,
    tokenizer,
    seqlen: int,
    max_windows: int | None = None,
    cache_dir: str | None = None,
    text_column: str | None = None,
    warn: Callable[[str], None] = log_warning,
) -> EvaluationSet:
    """Consecutive windows of seqlen tokens from the start of the text. An incomplete last window is dropped.

    Args:
        dataset: a name or path for `text.evaluation_text`; token ids of any shape, which are flattened to
            one text; or what else `given.ids_or_rows` takes.
        tokenizer: the model's; not needed for token ids.
        max_windows: upper bound on the number of windows.
        cache_dir: for downloads from the hub.
        text_column: of data that has columns.
        warn: receives one sentence for each thing that was skipped or replaced.
    Raises: `CalibrationError` if the text cannot be read or has fewer than seqlen tokens, or no tokenizer is
        given for it.
    """
    if not isinstance(dataset, (str, Path)):
        dataset = ids_or_rows(dataset, text_column)
    if isinstance(dataset, Tensor):
        ids, label = require_ids(dataset.flatten(), "of any shape"), "token ids"
    else:
        require_tokenizer(tokenizer, dataset)
        if isinstance(dataset, list):
            text = given_text(dataset, text_column, tokenizer).joined()
        else:
            text = evaluation_text(dataset, cache_dir, text_column, tokenizer)
        for note in text.notes:
            warn(note)
        ids, label = tokenize(tokenizer, text.documents[0], text.special_tokens), text.label
    nwindows = len(ids) // seqlen
    if not nwindows:
        raise CalibrationError(
            f"evaluation text {label} has {len(ids)} tokens, fewer than one window of {seqlen}"
        )
    nwindows = min(nwindows, max_windows or nwindows)
    return EvaluationSet(ids[: nwindows * seqlen].view(nwindows, seqlen), label)


def perplexity(
    model: nn.Module,
    data: str | Path | Tensor | Iterable | EvaluationSet,
    seqlen: int = 2048,
    *,
    tokenizer=None,
    max_windows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> float:
    """exp of the mean loss over all windows; a window's loss is the mean over its seqlen - 1 predictions.

    Args:
        model: a causal LM that returns `.logits`. It is not modified.
        data: an `EvaluationSet`, token ids, or text (by name, path, or as `evaluation_set` takes it), which
            needs a `tokenizer`.
        seqlen: tokens per window; ignored for an `EvaluationSet`.
        tokenizer: the model's.
        max_windows: upper bound on the number of windows; ignored for an `EvaluationSet`.
        progress: called after each forward with the number of windows done.
    Returns: the perplexity; infinity if the mean loss is too large for a float.
    Raises: `CalibrationError` as `evaluation_set`.
    Source: the published Wanda's `lib/eval.py`.
    """
    if not isinstance(data, EvaluationSet):
        data = evaluation_set(data, tokenizer, seqlen, max_windows)
    return mean_perplexity(losses(model, data, progress))


def losses(
    model: nn.Module, data: EvaluationSet, progress: Callable[[int], None] | None = None
) -> list[float]:
    """The mean loss of each window; `progress` as in `perplexity`."""
    device, batch, found = next(model.parameters()).device, batch_of(data), []
    for start in range(0, len(data.windows), batch):
        found += window_losses(model, data.windows[start : start + batch].to(device))
        if progress:
            progress(len(found))
    return found


def batch_of(data: EvaluationSet) -> int:
    """Windows per forward."""
    return max(1, TOKENS_PER_FORWARD // data.windows.shape[1])


def mean_perplexity(losses: list[float]) -> float:
    """Perplexity of windows with these mean losses."""
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor) -> list[float]:
    """The mean loss of each window of int64 token ids `[nwindows, seqlen]`, on the model's device."""
    options = {"use_cache": False}
    # A loss of the routers needs all blocks, which do not run in a streamed evaluation.
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        options["output_router_logits"] = False
    with faster_forward(windows.device), fused_modules(model), reused_memory():
        logits = model(windows, **options).logits
    # One window at a time, since each needs a copy of its logits in fp32.
    return [
        F.cross_entropy(row[:-1].float(), ids[1:]).item() for row, ids in zip(logits, windows, strict=True)
    ]
