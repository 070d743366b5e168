"""The published algorithms as the tests use them: in float32, with the gap of the closest decision."""

import math

import torch
import torch.nn.functional as F

from benchmarks.jobs import published_pipeline, published_selection


def prune_published(model, token_ids, method, pattern, *, gaps=None, use_variant=False, **options):
    """`published_pipeline.prune_published` on a live float32 model, in place; returns the masks.

    Args:
        gaps: a list that gets each linear's nearest_tie; rounding cannot change a decision with a wide gap.
        use_variant: wanda's per-row cumulative-sum variant, for a ratio.
    """
    assert all(p.dtype == torch.float32 for p in model.parameters()), "the oracle works in float32"

    def choose(scores):
        mask = select(scores, pattern, method, use_variant)
        if gaps is not None and method != "magnitude":
            gaps.append(nearest_tie(scores, mask, pattern, use_variant))
        return mask

    return published_pipeline.prune_published(model, token_ids, method, pattern, choose=choose, **options)


def select(scores, pattern, method, use_variant=False):
    """Which of scores [out, in] go: a bool mask."""
    if use_variant and method != "magnitude" and ":" not in pattern:
        return variant_mask(scores, variant_alpha(scores, float(pattern)))
    return published_selection.select(scores, pattern, method)


def variant_alpha(scores, ratio):
    """Wanda's variant: bisect alpha, from 0.4 within [0, 0.8], until sparsity is within 0.001 of ratio."""
    low, alpha, high = 0.0, 0.4, 0.8
    sparsity = variant_mask(scores, alpha).float().mean()
    while abs(sparsity - ratio) > 0.001 and high - low >= 0.001:
        if sparsity > ratio:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        sparsity = variant_mask(scores, alpha).float().mean()
    return alpha


def variant_mask(scores, alpha):
    """The lowest scores of a row while their sum is within alpha of the row's; ties of the last go, too."""
    ascending = torch.sort(scores, dim=1, stable=True).values
    count = (ascending.cumsum(dim=1) <= scores.sum(dim=1, keepdim=True) * alpha).sum(dim=1, keepdim=True)
    return scores <= ascending.gather(1, count - 1)


def nearest_tie(scores, mask, pattern, use_variant=False):
    """The closest decision: relative gap of highest score pruned and lowest kept, within a row or group."""
    group = int(pattern.split(":")[1]) if ":" in pattern else scores.shape[1]
    lost = scores.masked_fill(~mask, 0).reshape(-1, group).amax(dim=1)
    kept = scores.masked_fill(mask, math.inf).reshape(-1, group).amin(dim=1)
    gap = (1 - lost / kept).min().item()
    if use_variant:
        share = torch.sort(scores, dim=1).values.cumsum(dim=1) / scores.sum(dim=1, keepdim=True)
        gap = min(gap, (share / variant_alpha(scores, float(pattern)) - 1).abs().min().item())
    return gap


@torch.no_grad()
def perplexity_published(model, ids, seqlen):
    """exp of the mean of window losses, each the mean over its seqlen - 1 predicted tokens."""
    model.eval()
    ids = ids.reshape(1, -1)
    n_windows = ids.numel() // seqlen
    total = 0.0
    for i in range(n_windows):
        window = ids[:, i * seqlen : (i + 1) * seqlen]
        logits = model(window, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[0, 1:]).item() * seqlen
    return math.exp(total / (n_windows * seqlen))
