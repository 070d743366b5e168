"""Image classifiers are pruned as a straight copy of the published per-block loop prunes them."""

import pytest
import torch

import wanda_fast
from tests.published_vision import prune_published
from tests.tiny_classifiers import KINDS, build, images

pytestmark = pytest.mark.usefixtures("one_thread")


def zeros(model):
    return {f"{name}": weight == 0 for name, weight in model.state_dict().items()}


def options_of(pattern):
    return {"sparsity_type": pattern} if ":" in pattern else {"sparsity_ratio": float(pattern)}


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
@pytest.mark.parametrize(("pattern", "granularity"), [("0.5", "row"), ("0.5", "layer"), ("2:4", None)])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_the_published_loop(kind, pattern, granularity, statistics):
    model, reference, pixels = build(kind), build(kind), images(5)
    expected = prune_published(
        reference, kind, pixels, "wanda", pattern, granularity or "row", statistics == "sequential"
    )
    report = wanda_fast.prune(
        model,
        dataset=pixels,
        prune_granularity=granularity,
        statistics=statistics,
        batch_size=2,
        **options_of(pattern),
    )
    assert report.linears.keys() == expected.keys()
    found = zeros(model)
    for name, mask in expected.items():
        assert torch.equal(found[f"{name}.weight"], mask), name
    others = model.state_dict().keys() - {f"{name}.weight" for name in expected}
    dense = build(kind).state_dict()
    assert all(torch.equal(model.state_dict()[name], dense[name]) for name in others)


@pytest.mark.parametrize(("granularity", "published"), [(None, "layer"), ("layer", "layer"), ("row", "row")])
def test_magnitude_by_layer_unless_asked_by_row(granularity, published):
    model, reference = build("convnext"), build("convnext")
    expected = prune_published(reference, "convnext", images(2), "magnitude", "0.6", published)
    wanda_fast.prune(
        model, dataset=images(2), prune_method="magnitude", prune_granularity=granularity, sparsity_ratio=0.6
    )
    assert all(torch.equal(zeros(model)[f"{name}.weight"], mask) for name, mask in expected.items())
