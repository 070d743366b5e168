"""`--sequential linear` against its definition: each linear is scored on what it receives once all that runs
before it in its block, and all blocks before it, are pruned; but a gated MLP's down projection on what it
receives of every eighth sequence while the other two are dense."""

import copy
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import errors
from wanda_fast.model.architecture import find_blocks
from wanda_fast.model.linears import GatedMLP, Linear
from wanda_fast.pruning import sequential_linear as lockstep
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.statistics import DenseInputs, SquaredNorm

pytestmark = pytest.mark.usefixtures("one_thread")


def prune_by_definition(model, ids):
    """Wanda at one half; the whole model is run anew for each linear."""
    for block in find_blocks(model):
        of_down = {}
        for linear in in_order_of_calls(model, block, ids):
            if linear.gated is not None and linear.gated.down not in of_down:
                of_down[linear.gated.down] = squared_norm(model, linear.gated.down, ids[::8])
            sums = of_down.get(linear.module)
            sums = squared_norm(model, linear.module, ids) if sums is None else sums
            weight = linear.weight.data
            lowest = (weight.abs() * sums.sqrt()).sort(dim=1, stable=True).indices[:, : len(sums) // 2]
            weight.scatter_(1, lowest, 0.0)


def squared_norm(model, module, ids):
    sums = torch.zeros(module.in_features)

    def add(_module, args):
        sums.add_(args[0].reshape(-1, len(sums)).square().sum(0))

    handle = module.register_forward_pre_hook(add)
    model(ids, use_cache=False)
    handle.remove()
    return sums


def in_order_of_calls(model, block, ids):
    called = []
    handles = [
        linear.module.register_forward_pre_hook(lambda *_, linear=linear: called.append(linear))
        for linear in block.linears
    ]
    model(ids[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(called) == len(block.linears)
    return called


@pytest.mark.parametrize("name", ["llama3", "gemma2", "phi3", "opt"])
def test_equals_the_definition(name):
    dense = FAMILIES[name]()
    model, expected, ids = copy.deepcopy(dense), copy.deepcopy(dense), token_ids(dense, 9, 24)
    wanda_fast.prune(model, dataset=ids, batch_size=2, sequential="linear")
    prune_by_definition(expected, ids)
    published = copy.deepcopy(dense)
    wanda_fast.prune(published, dataset=ids, batch_size=2)
    equal, otherwise = zeros_in_common(model, expected), zeros_in_common(model, published)
    assert equal > 0.9995 > otherwise  # a swapped pair is a tie but for the last bit of a sum


class CallsOfThisThread(TorchFunctionMode):
    """Counts the calls that compute attention; a mode is of the thread that enters it."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.count, self.fails_at = 0, fails_at

    def __torch_function__(self, func, types, args=(), kwargs=None):
        attention = torch.nn.functional.scaled_dot_product_attention
        if func is attention and not args[0].is_meta:  # on meta a block only says what it returns
            self.count += 1
            if self.count == self.fails_at:
                raise torch.OutOfMemoryError("no memory left")
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_one_thread_computes_attention(monkeypatch):
    """The same results as in the batches' own threads, and its faults end the run."""
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "torch")  # no CPU kernel in its place
    dense = FAMILIES["llama3"]()
    own, asked, ids = copy.deepcopy(dense), copy.deepcopy(dense), token_ids(dense, 6, 16)
    with CallsOfThisThread() as calls:
        wanda_fast.prune(own, dataset=ids, batch_size=2, sequential="linear")
    assert calls.count == 0
    monkeypatch.setattr(lockstep, "_on_gpu", lambda block: True)
    with CallsOfThisThread() as calls:
        wanda_fast.prune(asked, dataset=ids, batch_size=2, sequential="linear")
    assert calls.count == 3 * len(find_blocks(dense))  # batches
    for mine, other in zip(own.parameters(), asked.parameters(), strict=True):
        assert torch.equal(mine, other)
    with CallsOfThisThread(fails_at=5), pytest.raises(errors.OutOfMemoryError):
        wanda_fast.prune(dense, dataset=ids, batch_size=2, sequential="linear")


def zeros_in_common(model, other):
    pairs = list(zip(find_blocks(model), find_blocks(other), strict=True))
    same = [
        (one.weight.eq(0) == two.weight.eq(0)).float().mean()
        for blocks in pairs
        for one, two in zip(blocks[0].linears, blocks[1].linears, strict=True)
    ]
    return torch.stack(same).mean().item()


@pytest.mark.parametrize("name", ["llama2", "opt", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("method", ["connect", "magnitude"])
def test_every_linear_is_pruned_once(name, method):
    model = FAMILIES[name]()
    report = wanda_fast.prune(
        model, prune_method=method, dataset=token_ids(model, 3, 16), batch_size=1, sequential="linear"
    )
    names = [linear.name for block in find_blocks(model) for linear in block.linears]
    assert list(report.linears) == names
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert "dense pass" not in report.seconds and "pruned pass" not in report.seconds


def test_downs_share_of_the_calibration_does_not_depend_on_the_batches():
    """Nor on which experts a router sends the first tokens to."""
    for name in ("llama2", "qwen3_moe"):
        pruned = []
        for batch_size in (1, 4, 9):
            model = FAMILIES[name]()
            ids = token_ids(model, 9, 16)
            wanda_fast.prune(model, dataset=ids, batch_size=batch_size, sequential="linear")
            pruned.append(model)
        assert zeros_in_common(*pruned[:2]) > 0.9995 < zeros_in_common(*pruned[1:])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape, every", [((20, 3, 4), 8), ((40, 4), 9)])
def test_the_dense_share_runs_on_from_batch_to_batch(shape, every, fused):
    gate, up = (torch.nn.Linear(4, 12 if fused else 6, bias=False) for _ in range(2))
    up = gate if fused else up
    down = torch.nn.Linear(6, 4)
    norm = SquaredNorm(Linear("down", down))
    dense, x = DenseInputs(GatedMLP(gate, up, torch.nn.SiLU(), down), norm), torch.randn(shape)
    with torch.no_grad():
        for part in x.split([1, 0, 6, 2, len(x) - 9]):
            dense.add(part)
        outputs = [module(x[::every]) for module in (gate, up)]
        outputs = outputs[0].chunk(2, dim=-1) if fused else outputs
        wanted = (torch.nn.functional.silu(outputs[0]) * outputs[1]).reshape(-1, 6).square().sum(0)
    torch.testing.assert_close(norm.acc, wanted)


def test_a_down_projection_that_no_token_reached_has_no_statistic():
    """As any other linear: a warning names it."""
    block = find_blocks(FAMILIES["llama2"]())[0]
    down = next(linear.name for linear in block.linears if linear.module is block.linears[-2].gated.down)
    statistics = BlockStatistics(block, SquaredNorm, before_call=True)
    with statistics.gathering(), torch.no_grad():
        assert statistics.by_name == {}
        block.module.mlp(torch.randn(1, 3, block.linears[-2].module.in_features))
        assert statistics.by_name[down].acc.sum() > 0


def test_a_fault_ends_all_batches():
    model = FAMILIES["llama2"]()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    before = threading.active_count()
    with pytest.raises(errors.NonFiniteError, match=r"model\.layers\.1.*up_proj\.weight.*\[3, 5\]"):
        wanda_fast.prune(model, dataset=token_ids(model, 4, 16), batch_size=1, sequential="linear")
    assert threading.active_count() == before
    assert not any(linear.module._forward_pre_hooks for b in find_blocks(model) for linear in b.linears)


def test_no_other_word():
    model = FAMILIES["llama2"]()
    with pytest.raises(errors.UnknownMethodError, match="'block' or 'linear', got 'row'"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), sequential="row")
