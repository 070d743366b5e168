"""Statistics of experts: which tokens count, and how few tokens are made up for."""

import pytest
import torch

import wanda_fast
from tests.tiny_models import build, token_ids
from wanda_fast import errors
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.model.architecture import find_blocks
from wanda_fast.model.experts import sorted_by_expert
from wanda_fast.pruning import expert_statistics
from wanda_fast.pruning.expert_statistics import ExpertOptions, TokenSample
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.methods import make_method
from wanda_fast.pruning.summing import complete
from wanda_fast.run import hessian_memory

TAU = 16.0


def gathered(method, options):
    """(block, statistics, the experts' inputs: tokens `[T, in]`, experts and weights `[T, k]`)."""
    model = build("mixtral")
    block, seen = find_blocks(model)[0], []
    (experts,) = block.experts
    handle = experts.module.register_forward_pre_hook(lambda _module, args: seen.append(args))
    method = make_method(method, connect_gate="activated")
    statistics = BlockStatistics(block, method.statistic, method.make_hessian, expert_options=options)
    with sorted_by_expert(block.experts), statistics.gathering():
        for ids in token_ids(model, 4, 24).split(2):
            model(ids)
    handle.remove()
    complete(statistics, block, Ranks())
    return block, statistics, *(torch.cat(each) for each in zip(*seen, strict=True))


def sums_of(method, linear, x, weights):
    """The statistic by the formulas, fp64: `weights[t]` counts for token t."""
    experts, x = linear.experts, x.double()
    gate, up = (x @ experts.first.stack[linear.index].double().t()).chunk(2, dim=-1)
    gate.requires_grad_()
    act = torch.nn.functional.silu(gate)
    (slope,) = torch.autograd.grad(act.sum(), gate)
    act, hidden = act.detach(), (act * up).detach()
    if linear.matrix == "down_proj":
        return (weights[:, None] * hidden.square()).sum(0)
    if method == "connect" and linear.matrix == "up_proj":
        return (weights[:, None] * act.abs()).t() @ x.abs()
    if method == "gated":
        factor = act if linear.matrix == "up_proj" else up * slope
        return (weights[:, None] * factor.square()).t() @ x.square()
    return (weights[:, None] * x.square()).sum(0)


def routed_to(linear, index, router):
    """The tokens of a linear's expert, and the router's weights for it."""
    chosen = index == linear.index
    return chosen.any(-1), (router * chosen).sum(-1).double()


@pytest.mark.parametrize("method", ["wanda", "connect", "gated"])
@pytest.mark.parametrize(
    "options",
    [
        ExpertOptions(),
        ExpertOptions(shrinkage=TAU),
        ExpertOptions(tokens="all"),
        ExpertOptions(weighting="router"),
    ],
    ids=["routed", "shrinkage", "all", "router"],
)
def test_statistics_are_those_of_the_formulas(method, options):
    block, statistics, x, index, router = gathered(method, options)
    linears = [linear for linear in block.linears if linear not in block.dense]
    assert len(linears) == 4 * 3
    counts = statistics.tokens()
    for linear in linears:
        own, weights = routed_to(linear, index, router)
        assert counts[linear.name] == int(own.sum())
        weights = weights.square() if options.weighting == "router" else own.double()
        if options.tokens == "all":
            weights = torch.ones_like(weights)
        weights = weights + options.shrinkage / len(x)
        expected = sums_of(method, linear, x, weights)
        found = statistics.by_name[linear.name].acc.double()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-8, msg=linear.name)


def test_hessians_shrink_too():
    block, statistics, x, index, router = gathered("sparsegpt", ExpertOptions(shrinkage=TAU))
    for linear in (linear for linear in block.linears if linear not in block.dense):
        own, _ = routed_to(linear, index, router)
        if linear.matrix != "down_proj":
            weights = own.double() + TAU / len(x)
            expected = (weights[:, None] * x.double()).t() @ x.double()
            found = statistics.hessians[linear.name].acc.double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_experts_with_enough_tokens_keep_their_own(monkeypatch):
    block, plain, _, index, _ = gathered("wanda", ExpertOptions())
    most = max(plain.tokens().values())
    monkeypatch.setattr(expert_statistics, "STARVED_TOKENS", most)
    _, shrunk, *_ = gathered("wanda", ExpertOptions(shrinkage=TAU))
    for linear in (linear for linear in block.linears if linear not in block.dense):
        same = torch.equal(shrunk.by_name[linear.name].acc, plain.by_name[linear.name].acc)
        assert same == (plain.tokens()[linear.name] == most), linear.name


def test_shrinkage_in_one_pass_too():
    """With attention left dense, the first block's experts see the same tokens in either order."""
    zeros = {}
    for sequential, shrinkage in (("block", 0.0), ("block", TAU), ("linear", TAU)):
        model = build("mixtral")
        options = dict(dataset=token_ids(model, 4, 24), batch_size=2, seqlen=24, ignore=["*.self_attn.*"])
        wanda_fast.prune(model, sequential=sequential, expert_shrinkage=shrinkage, **options)
        zeros[sequential, shrinkage] = {
            linear.name: linear.weight == 0 for linear in find_blocks(model)[0].linears[4:]
        }
    plain, shrunk, one_pass = zeros.values()
    assert all(torch.equal(shrunk[name], one_pass[name]) for name in plain)
    assert not all(torch.equal(shrunk[name], plain[name]) for name in plain)


def test_hessians_in_several_passes_give_the_same(monkeypatch):
    weights, passes = [], []
    for share in (0.5, 1e-12):
        monkeypatch.setattr(hessian_memory, "SHARE_OF_DEVICE", share)
        model = build("mixtral")
        options = dict(prune_method="sparsegpt", sparsity_type="2:4", batch_size=2, seqlen=24)
        report = wanda_fast.prune(model, dataset=token_ids(model, 4, 24), **options)
        passes.append(report.resources["passes"])
        weights.append(model.state_dict())
        linears = [linear.name for block in find_blocks(model) for linear in block.linears]
        assert list(report.linears) == linears and report.sparsity == 0.5
    assert passes == [1, 4]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("shrinkage", [-1, float("nan"), float("inf"), "much"])
def test_a_shrinkage_that_is_no_number_from_0_on(shrinkage):
    model = build("mixtral")
    with pytest.raises(errors.OptionError, match="expert_shrinkage must be a number from 0 on, got"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 24), expert_shrinkage=shrinkage)


@pytest.mark.parametrize("tokens", [5, 1024, 5000, 40000])
def test_the_sample_is_even_and_does_not_depend_on_the_batches(tokens):
    x, samples = torch.arange(tokens)[:, None], []
    for size in (tokens, 7, 1000):
        sample = TokenSample()
        for part in x.split(size):
            sample.see(part)
        samples.append(sample.tokens.flatten())
    assert all(torch.equal(samples[0], other) for other in samples)
    assert len(samples[0]) == tokens or 1024 <= len(samples[0]) < 2048
    assert len(samples[0].diff().unique()) <= 1
