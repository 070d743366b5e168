"""A run inside the caller's autocast, inference mode or default dtype: statistics are fp32 all the same."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import errors
from wanda_fast.pruning.hessian import Hessian
from wanda_fast.pruning.selection import Selection

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["wanda", "connect", "gated", "sparsegpt"]


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def built(trainable=False):
    return FAMILIES["llama3"]().requires_grad_(trainable)


def pruned(method, model=None, **options):
    """The weights of a model that `method` has pruned."""
    model = built() if model is None else model
    ids = token_ids(model, 2, 16)
    options = dict(prune_method=method, sparsity_type="2:4", batch_size=1) | options
    wanda_fast.prune(model, dataset=ids, **options)
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(weights, expected):
    return all(map(torch.equal, weights, expected))


@pytest.mark.parametrize("sequential", ["block", "linear"])
@pytest.mark.parametrize("method", METHODS)
def test_masks_do_not_depend_on_the_default_dtype_or_inference_mode(method, sequential):
    expected = pruned(method, sequential=sequential)
    with default_dtype(torch.bfloat16):
        assert same(pruned(method, built(), sequential=sequential), expected)
    with torch.inference_mode():
        model = built()
        assert same(pruned(method, sequential=sequential), expected)
    assert same(pruned(method, model, sequential=sequential), expected)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_fp32_under_any_default_dtype(method, monkeypatch):
    seen = []
    make = Selection.statistics
    monkeypatch.setattr(Selection, "statistics", lambda *args: seen.append(make(*args)) or seen[-1])
    made = Hessian.__init__
    monkeypatch.setattr(
        Hessian, "__init__", lambda *args, **kw: made(*args, **kw) or hessians.append(args[0].acc.dtype)
    )
    hessians = []
    with default_dtype(torch.float64):
        pruned(method)
    accs = [own.acc.dtype for each in seen for own in each.by_name.values()]
    assert set(accs + hessians) == {torch.float32}


def test_an_activation_unknown_to_the_kernels_in_inference_mode():
    def squashed():
        model = built()
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Tanh()
        return model

    expected = pruned("gated", squashed())
    with torch.inference_mode():
        assert same(pruned("gated", squashed()), expected)


@pytest.mark.parametrize("sequential", ["block", "linear"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_autocast_reaches_the_forwards_alone(method, sequential):
    """Autocast keeps 16-bit copies of trainable weights: the pruned pass must not read dense ones."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = pruned(method, built(trainable=True), sequential=sequential)
        expected = pruned(method, built(), sequential=sequential)
    assert same(weights, expected)


def test_reconstruction_errors_under_autocast():
    def errors():
        model = built()
        ids = token_ids(model, 2, 16)
        options = dict(prune_method="magnitude", measure_error=True, sparsity_type="2:4")
        return [linear.error for linear in wanda_fast.prune(model, dataset=ids, **options).linears.values()]

    expected = errors()[:3]  # q, k and v of the first block: autocast leaves their input in fp32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert errors()[:3] == expected


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_live_float64_model_is_refused_before_the_work(method):
    model = built().double()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(errors.DtypeError, match=r"layers\.0\.self_attn\.q_proj is torch\.float64 \[64, 64\]"):
        pruned(method, model)
    assert same(model.parameters(), before)
