"""The driver's masks against the published algorithm's, weight by weight, on tiny models of every family."""

import pytest
import torch

import wanda_fast
from tests.published import perplexity_published, prune_published
from tests.tiny_models import FAMILIES, OF_LINEARS, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

PERPLEXITY_RTOL = 1e-4
BATCHED_MASKS = 0.9999  # equal whatever the batch size, of all weights
CLEAR_GAP = (
    2e-6  # relative, between the last score pruned and the first kept: several times fp32's rounding of a sum
)

RATIOS, PATTERNS = ("0.3", "0.5", "0.7"), ("2:4", "4:8", "1:4")
CASES = [
    (method, pattern, False)
    for method in ("magnitude", "wanda", "connect", "gated")
    for pattern in RATIOS + PATTERNS
]
CASES += [("wanda", ratio, True) for ratio in RATIOS] + [("gated", "0.5", True)]
CASES = [("llama3", *case) for case in CASES]
# a family without a gated MLP and one with biases: no pattern depends on the family
CASES += [
    (family, method, pattern, False)
    for family in ("opt", "qwen2")
    for method in ("magnitude", "wanda", "connect", "gated")
    for pattern in ("0.5", "2:4")
]
CASES += [("opt", "wanda", "0.5", True), ("qwen2", "wanda", "0.5", True)]


def prune_clearly(family, method, pattern, nsamples=4, seqlen=32, **options):
    """The published algorithm, on the first calibration tokens for which no mask hangs on rounding.

    Returns: pruned model, its masks, the tokens.
    """
    for seed in range(50):
        model, gaps = FAMILIES[family](), []
        ids = token_ids(model, nsamples, seqlen, seed)
        masks = prune_published(model, ids, method, pattern, gaps=gaps, **options)
        if min(gaps, default=1.0) > CLEAR_GAP:
            return model, masks, ids
    raise AssertionError(f"{family} {method} {pattern}: a near tie for every seed")


def prune_fast(family, method, pattern, ids, **options):
    model = FAMILIES[family]()
    if ":" in pattern:
        sparsity = dict(sparsity_type=pattern, sparsity_ratio=None)
    else:
        sparsity = dict(sparsity_type="unstructured", sparsity_ratio=float(pattern))
    return model, wanda_fast.prune(model, prune_method=method, dataset=ids, **sparsity, **options)


def zeros_of(model, masks):
    return {name: model.get_submodule(name).weight == 0 for name in masks}


def differing_masks(model, masks):
    """Names of linears whose zeros are not exactly the mask, with how many weights differ."""
    counts = {name: (zeros != masks[name]).sum().item() for name, zeros in zeros_of(model, masks).items()}
    return {name: count for name, count in counts.items() if count}


def changed_parameters(model, expected):
    """Names of parameters, pruned or not, that are not bit for bit as expected."""
    return [n for n, p in expected.named_parameters() if not torch.equal(p, model.get_parameter(n))]


@pytest.mark.parametrize(("family", "method", "pattern", "use_variant"), CASES)
def test_masks_and_perplexity_equal(family, method, pattern, use_variant):
    expected, masks, ids = prune_clearly(family, method, pattern, use_variant=use_variant)
    model, report = prune_fast(family, method, pattern, ids, batch_size=1, use_variant=use_variant)
    assert differing_masks(model, masks) == {}
    assert changed_parameters(model, expected) == []

    assert report.linears.keys() == masks.keys()
    for name, mask in masks.items():
        assert report.linears[name].sparsity == pytest.approx(mask.float().mean().item(), abs=1e-6)
    total = sum(mask.sum().item() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert report.sparsity == pytest.approx(total, abs=1e-6)

    text = token_ids(model, 1, 100, seed=99)  # three windows of 32; the rest is dropped
    measured = wanda_fast.perplexity(model, text, seqlen=32)
    assert measured == pytest.approx(perplexity_published(expected, text, 32), rel=PERPLEXITY_RTOL)


def test_raw_gate_of_connect():
    _, masks, ids = prune_clearly("llama3", "connect", "2:4", connect_gate="raw")
    model, _ = prune_fast("llama3", "connect", "2:4", ids, batch_size=1, connect_gate="raw")
    assert differing_masks(model, masks) == {}
    activated, _ = prune_fast("llama3", "connect", "2:4", ids, batch_size=1)
    assert "model.layers.0.mlp.up_proj" in differing_masks(activated, masks)


@pytest.mark.parametrize("family", OF_LINEARS)
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_every_family(family, pattern):
    """Each block of each family gets its own arguments (kinds of attention alternate in Gemma and OLMo 3)."""
    _, masks, ids = prune_clearly(family, "wanda", pattern)
    model, report = prune_fast(family, "wanda", pattern, ids, batch_size=1)
    assert report.linears.keys() == masks.keys()
    assert differing_masks(model, masks) == {}
    for zeros in zeros_of(model, masks).values():
        assert (zeros.sum(dim=1) == zeros.shape[1] // 2).all()
    dense = FAMILIES[family]()
    assert {n.removesuffix(".weight") for n in changed_parameters(model, dense)} == masks.keys()


@pytest.mark.parametrize(
    ("family", "method", "pattern"),
    [(family, "wanda", "0.5") for family in ("llama3", "gemma2", "gemma3", "opt", "mistral")]
    + [(family, *case) for family in ("llama3", "gemma2") for case in (("connect", "2:4"), ("gated", "0.5"))],
)
def test_batch_size_does_not_matter(family, method, pattern):
    _, masks, ids = prune_clearly(family, method, pattern, nsamples=16)
    total = sum(mask.numel() for mask in masks.values())
    for batch_size in (1, 4, 16, 5):  # the last batch of 5 is a batch of 1
        model, _ = prune_fast(family, method, pattern, ids, batch_size=batch_size)
        differing = sum(differing_masks(model, masks).values())
        assert differing <= (1 - BATCHED_MASKS) * total, f"batch size {batch_size}: {differing} of {total}"


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "7:16"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_reported_sparsity_is_counted_sparsity(method, pattern):
    kept, group = map(int, pattern.split(":"))
    model = FAMILIES["qwen3"]()
    model, report = prune_fast("qwen3", method, pattern, token_ids(model, 4, 32))
    zeros = torch.cat([(model.get_submodule(name).weight == 0).reshape(-1, group) for name in report.linears])
    assert (zeros.sum(dim=1) == group - kept).all()
    assert report.sparsity == pytest.approx(1 - kept / group)
