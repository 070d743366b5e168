"""Perplexity of a model in memory, as the published code computes it."""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from wanda_fast.data.evaluation import EvaluationSet, evaluation_set
from wanda_fast.data.scores import Scores, score, tokens_at_once
from wanda_fast.model.head import fast_forwards, logits


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
    return whole_scores(model, data, progress).perplexity


def whole_scores(
    model: nn.Module, data: EvaluationSet, progress: Callable[[int], None] | None = None
) -> Scores:
    """Scores of a model by forwards of the whole model; `progress` as in `perplexity`."""
    device, found = next(model.parameters()).device, Scores()
    with fast_forwards(model, device):
        for batch in data.batches():
            ids = data.windows[batch].to(device)
            whole = logits(model, ids)
            at_once = tokens_at_once(whole.shape[-1], device)
            found += score(ids, {"dense": lambda tokens, whole=whole: whole[:, tokens]}, at_once)["dense"]
            if progress:
                progress(batch.stop)
    return found
