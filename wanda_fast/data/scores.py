"""What logits say of a window: the losses of a model, and its distance to the dense model."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.model.architecture import Block
from wanda_fast.model.head import fast_forwards, logits_after

# Logits that are held in fp32 at a time: of 64 tokens with a vocabulary of 262,144 on a CPU. At most
# COPIES such arrays exist at once.
VALUES_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}
COPIES = 5
# Differences of log-probabilities that are made at a time: they stay in a cache of some MiB.
VALUES_IN_CACHE = 2**20


@dataclass
class Scores:
    """Of a model on windows, each value the mean over a window's predictions.

    Attributes:
        losses: cross-entropy of the next token, in nats.
        kl: KL(dense || model) of the distributions of the next token, in nats; empty for the dense model.
        flips: share of the predictions whose first choice differs from the dense model's; likewise.
    """

    losses: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)

    def __iadd__(self, more: "Scores") -> Self:
        self.losses += more.losses
        self.kl += more.kl
        self.flips += more.flips
        return self

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def perplexity(self) -> float:
        return exponential(self.loss)


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are looked at together."""
    return max(1, VALUES_AT_ONCE.get(device.type, VALUES_AT_ONCE["cpu"]) // vocabulary)


def scores_of_hidden(
    model: nn.Module,
    blocks: list[Block],
    evaluation: EvaluationSet,
    hidden_of: dict[str, Callable[[slice], Tensor]],
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Scores]:
    """Scores by name, from the hidden states behind the last block.

    Args:
        hidden_of: by name, a function from a slice of the windows to the last block's outputs
            `[nwindows, seqlen, features]`. The dense model comes first.
        device: of the model's head.
        progress: called with the number of windows done.
    """
    found = {name: Scores() for name in hidden_of}
    at_once = tokens_at_once(model.config.get_text_config().vocab_size, device)

    def logits(ids: Tensor, hidden: Tensor, tokens: slice) -> Tensor:
        return logits_after(model, blocks, ids[:, tokens], hidden[:, tokens])

    with fast_forwards(model, device):
        for batch in evaluation.batches():
            ids = evaluation.windows[batch].to(device)
            states = {name: hidden(batch).to(device) for name, hidden in hidden_of.items()}
            each = score(
                ids, {name: partial(logits, ids, hidden) for name, hidden in states.items()}, at_once
            )
            for name in found:
                found[name] += each[name]
            if progress:
                progress(batch.stop)
    return found


@torch.no_grad()
def score(
    windows: Tensor, logits_of: dict[str, Callable[[slice], Tensor]], at_once: int
) -> dict[str, Scores]:
    """Scores of several models on a batch of windows, by the model's name.

    Args:
        windows: token ids int64 `[nwindows, seqlen]`, on the device of the logits.
        logits_of: by name, a function from a slice of the windows' tokens to logits
            `[nwindows, tokens, vocabulary]`. The first model is the dense one, to which others are compared.
        at_once: tokens whose logits are asked for together, of all windows.
    """
    nwindows, seqlen = windows.shape
    step = max(1, at_once // nwindows)
    sums = {name: torch.zeros(3, nwindows, dtype=torch.float64) for name in logits_of}
    for start in range(0, seqlen - 1, step):
        tokens, dense = slice(start, min(start + step, seqlen - 1)), None
        following = windows[:, tokens.start + 1 : tokens.stop + 1, None]
        for name, logits in logits_of.items():
            choice, log_q = _choices(logits(tokens))
            sums[name][0] -= _sum_of_window(log_q.gather(-1, following)[..., 0])
            if dense is None:
                dense = choice, log_q
                continue
            sums[name][1] += _sum_of_window(divergence(dense[1], log_q))
            sums[name][2] += _sum_of_window(choice != dense[0])
    means = {name: (each / (seqlen - 1)).tolist() for name, each in sums.items()}
    first = next(iter(means))
    return {name: Scores(*each[: 1 if name == first else 3]) for name, each in means.items()}


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, from log-probabilities in fp32. A word of no probability adds 0."""
    rows = max(1, (VALUES_IN_CACHE if log_p.device.type == "cpu" else log_p.numel()) // log_p.shape[-1])
    parts = zip(log_p.flatten(0, -2).split(rows), log_q.flatten(0, -2).split(rows), strict=True)
    return torch.cat([_divergence(*part) for part in parts]).view(log_p.shape[:-1])


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = log_p.exp().mul_(log_p - log_q)
    total = terms.sum(-1)
    # 0 times (-inf + inf)
    return terms.masked_fill_(log_p.isneginf(), 0).sum(-1) if total.isnan().any() else total


def _choices(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first choice for each token, and log-probabilities in fp32."""
    return logits.argmax(-1), logits.float().log_softmax(-1)


def _sum_of_window(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float64).cpu()


def joined(parts: list[dict[str, Scores]]) -> dict[str, Scores]:
    """Scores of the windows of all parts, in their order."""
    found = {name: Scores() for name in parts[0]}
    for part in parts:
        for name in found:
            found[name] += part[name]
    return found


def summary(scores: dict[str, Scores]) -> dict[str, float]:
    """Perplexities by name, as a report keeps them; of "pruned" also its distance to "dense"."""
    found = {name: each.perplexity for name, each in scores.items()}
    if (pruned := scores.get("pruned")) and pruned.kl:
        found["ratio"] = exponential(pruned.loss - scores["dense"].loss)
        found["kl"] = sum(pruned.kl) / len(pruned.kl)
        found["flips"] = sum(pruned.flips) / len(pruned.flips)
    return found


def exponential(loss: float) -> float:
    """Infinity if it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
