"""Linears that no calibration token reaches, or zeros alone: magnitude prunes them; the report says so."""

import pytest
import torch
from torch import nn

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [
    dict(prune_method="wanda"),
    dict(prune_method="wanda", update="obs"),
    dict(prune_method="connect"),
    dict(prune_method="gated"),
    dict(prune_method="sparsegpt"),
    dict(prune_method="ablate_wanda_iter"),
    dict(prune_method="admm"),
    dict(prune_method="wanda", refine=2, polish=2),
]
NM, HALF = dict(sparsity_type="2:4"), dict(sparsity_ratio=0.5)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, 48, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(48, 64, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Expert 0 receives every token, expert 1 an empty batch, and expert 2 is never called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        self.experts[1](flat[:0])
        return self.experts[0](flat).view_as(x)


def with_experts():
    model = FAMILIES["llama2"]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.model.layers[1].mlp = Experts().requires_grad_(False)
    return model


UNSEEN = [
    f"model.layers.1.mlp.experts.{expert}.{name}_proj" for expert in (1, 2) for name in ("gate", "up", "down")
]


def prune_both(make, names, options, pattern):
    """(report, whether the linears `names` have magnitude's weights) of a model pruned by `options`."""
    model, expected = make(), make()
    ids = token_ids(model, 4, 16)
    report = wanda_fast.prune(model, dataset=ids, batch_size=2, **options, **pattern)
    wanda_fast.prune(expected, prune_method="magnitude", **pattern)
    same = [torch.equal(model.get_submodule(n).weight, expected.get_submodule(n).weight) for n in names]
    return report, same


@pytest.mark.parametrize("sequential, pattern", [("block", NM), ("linear", NM), ("block", HALF)])
@pytest.mark.parametrize("options", METHODS)
def test_experts_without_a_token(options, sequential, pattern):
    report, same = prune_both(with_experts, UNSEEN, options | dict(sequential=sequential), pattern)
    assert all(same)
    fallen = {name: linear.fallback for name, linear in report.linears.items() if linear.fallback}
    assert fallen == dict.fromkeys(UNSEEN, "magnitude")
    why = "were pruned by magnitude, since no calibration token reached them, or zeros alone"
    listed = [name for name in report.linears if name in UNSEEN][:3]
    assert report.warnings == [f"6 linears {why}: {', '.join(listed)} and 3 more"]


@pytest.mark.parametrize("options", METHODS)
def test_inputs_of_zeros_alone(options):
    def without_input():
        model = FAMILIES["llama2"]()
        model.model.layers[1].post_attention_layernorm.weight.zero_()
        return model

    dead = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    report, same = prune_both(without_input, dead, options, HALF)
    assert all(same) and [name for name, linear in report.linears.items() if linear.fallback] == dead
    assert report.warnings and all("3 linears were pruned by magnitude" in each for each in report.warnings)


@pytest.mark.parametrize("method", ["connect", "gated"])
def test_a_gate_that_never_opens(method):
    """The statistic of up is zero, though tokens reach it."""

    def closed():
        model = FAMILIES["llama2"]()
        model.model.layers[0].mlp.act_fn = nn.Threshold(1e9, 0.0)
        return model

    up = "model.layers.0.mlp.up_proj"
    report, same = prune_both(closed, [up], dict(prune_method=method), NM)
    assert all(same) and report.linears[up].fallback == "magnitude"


def test_a_method_without_a_statistic_for_some_linears(monkeypatch):
    """None from `Method.statistic` means that the score needs none, which is no reason to fall back."""

    class Plain(wanda_fast.Method):
        def statistic(self, linear):
            return None if linear.name.endswith("q_proj") else super().statistic(linear)

    class Scored(Plain):
        def score(self, weight, acc):
            assert acc.dtype == torch.float32
            return weight.float().abs() + acc.sqrt()

    for cls in (Plain, Scored):
        monkeypatch.setitem(wanda_fast.pruning.registry.METHODS, "some", cls)
        q = "model.layers.0.self_attn.q_proj"
        report, same = prune_both(FAMILIES["llama2"], [q], dict(prune_method="some"), NM)
        assert all(same) and report.linears[q].fallback is None and not report.warnings
