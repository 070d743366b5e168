"""`gated`: what its score predicts, against what removing a weight does; and its statistics wherever hooks
and order could spoil them."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from tests.wanda_fast.pruning.test_published_masks import differing_masks, prune_clearly, prune_fast
from wanda_fast.model.architecture import find_blocks
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.methods import make_method
from wanda_fast.pruning.selection import prune_block

pytestmark = pytest.mark.usefixtures("one_thread")


def statistics_of(model, ids, method="gated"):
    """acc of block 0's linears, by name."""
    method = make_method(method, connect_gate="activated")
    statistics = BlockStatistics(find_blocks(model)[0], method.statistic)
    with statistics.gathering():
        model(ids, use_cache=False)
    return {name: statistic.acc for name, statistic in statistics.by_name.items()}


class FirstMLP:
    """The gated MLP of block 0 in fp64: h = act(gate(x)) * up(x), its weights, and its calibration inputs."""

    def __init__(self, model, ids):
        self.mlp = copy.deepcopy(model.model.layers[0].mlp).double()
        self.name, inputs = "model.layers.0.mlp", []
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(ids, use_cache=False)
        handle.remove()
        self.x = torch.cat(inputs).flatten(0, -2).double()

    def rows_of(self, projection):
        """(name of the linear, its weight, the first of the projection's rows)."""
        if hasattr(self.mlp, "gate_up_proj"):
            weight = self.mlp.gate_up_proj.weight
            return f"{self.name}.gate_up_proj", weight, len(weight) // 2 if projection == "up" else 0
        return f"{self.name}.{projection}_proj", self.mlp.get_submodule(f"{projection}_proj").weight, 0

    def hidden(self):
        """[tokens, intermediate]: what down_proj receives."""
        received = []
        handle = self.mlp.down_proj.register_forward_pre_hook(lambda _, args: received.append(args[0]))
        self.mlp(self.x)
        handle.remove()
        return received[0]

    def change(self, weight, row, col, fraction):
        """[tokens, intermediate]: how h changes when this fraction of one weight is taken away."""
        before, kept = self.hidden(), weight[row, col].item()
        weight[row, col] = kept * (1 - fraction)
        change = self.hidden() - before
        weight[row, col] = kept
        return change


@pytest.mark.parametrize("family", ["llama3", "gemma2", "phi3", "glm4"])
def test_a_removed_weight_changes_the_hidden_value_as_predicted(family):
    """Exactly in up_proj. In gate_proj to first order: what is left falls with the square of the change."""
    model = FAMILIES[family]()
    ids = token_ids(model, 2, 24)
    found, first = statistics_of(model, ids), FirstMLP(model, ids)
    for projection in ("up", "gate"):
        name, weight, offset = first.rows_of(projection)
        for row, col in ((0, 0), (3, 17), (159, 63), (80, 5)):
            magnitude = weight[offset + row, col].abs()
            predicted = magnitude * found[name][offset + row, col].double().sqrt()
            whole = first.change(weight, offset + row, col, 1.0)
            assert not whole[:, [i for i in range(160) if i != row]].any()
            if projection == "up":
                torch.testing.assert_close(whole.norm(), predicted, rtol=1e-5, atol=0)
                continue
            steps = [first.change(weight, offset + row, col, 2.0**-k)[:, row] for k in (4, 5, 20)]
            slope = steps[2] * 2**20
            torch.testing.assert_close(slope.norm(), predicted, rtol=1e-5, atol=0)
            errors = [(step - slope * 2.0**-k).norm() for step, k in zip(steps, (4, 5), strict=False)]
            assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("family", ["phi3", "glm4"])
@pytest.mark.parametrize("method", ["connect", "gated"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_fused_projections_by_halves(family, method, pattern):
    _, masks, ids = prune_clearly(family, method, pattern)
    model, _ = prune_fast(family, method, pattern, ids, batch_size=1)
    assert differing_masks(model, masks) == {}
    wanda, _ = prune_fast(family, "wanda", pattern, ids, batch_size=1)
    name = "model.layers.0.mlp.gate_up_proj"
    of_gate, of_up = (wanda.get_submodule(name).weight.eq(0) != masks[name]).chunk(2)
    assert of_up.any() and of_gate.any() == (method == "gated")


@pytest.mark.parametrize("activation", ["mish", "quick_gelu", "gelu", "gelu_new", "relu"])
def test_any_activation(activation, monkeypatch):
    """Those that the kernels know, and those whose slope autograd finds."""

    def build():
        model = FAMILIES["llama2"]()
        for layer in model.model.layers:
            layer.mlp.act_fn = copy.deepcopy(ACT2FN[activation])
        return model

    monkeypatch.setitem(FAMILIES, "activation", build)
    _, masks, ids = prune_clearly("activation", "gated", "2:4")
    model, _ = prune_fast("activation", "gated", "2:4", ids, batch_size=1)
    assert differing_masks(model, masks) == {}


def test_an_activation_that_overwrites_its_input():
    model, ids = FAMILIES["llama2"](), token_ids(FAMILIES["llama2"](), 2, 24)
    expected = statistics_of(model, ids)
    model.model.layers[0].mlp.act_fn = nn.SiLU(inplace=True)
    found = statistics_of(model, ids)
    for name, acc in expected.items():
        torch.testing.assert_close(found[name], acc, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ignored", ["gate_proj", "up_proj", "down_proj"])
def test_what_is_not_pruned_is_still_read(ignored):
    """Without down_proj, up_proj is a block's last linear, whose output no other one reads."""
    whole, part = FAMILIES["llama2"](), FAMILIES["llama2"]()
    ids = token_ids(whole, 3, 24)
    for model, ignore in ((whole, ()), (part, (f"*.{ignored}",))):
        wanda_fast.prune(model, prune_method="gated", dataset=ids, batch_size=1, ignore=ignore)
    for projection in {"gate_proj", "up_proj", "down_proj"} - {ignored}:
        name = f"model.layers.0.mlp.{projection}.weight"
        assert torch.equal(whole.get_parameter(name), part.get_parameter(name)), name
    assert not (part.get_submodule(f"model.layers.1.mlp.{ignored}").weight == 0).any()


class UpFirst(LlamaMLP):
    """Llama's, in FalconH1's order."""

    def forward(self, x):
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


def up_first():
    model = FAMILIES["llama3"]()
    for layer in model.model.layers:
        layer.mlp.__class__ = UpFirst
    return model


@pytest.mark.parametrize("family", ["llama3", "gemma2", "phi3", "up_first"])
@pytest.mark.parametrize("method", ["gated", "connect"])
def test_sequential_linear_scores_both_projections_while_both_are_dense(family, method, monkeypatch):
    """Block 0 by definition: attention pruned first, then an MLP's dense outputs on what it then receives."""
    monkeypatch.setitem(FAMILIES, "up_first", up_first)
    model, pruned = FAMILIES[family](), FAMILIES[family]()
    ids = token_ids(model, 5, 24)
    wanda_fast.prune(pruned, prune_method=method, dataset=ids, batch_size=2, sequential="linear")
    linears = find_blocks(model)[0].linears
    for linear in linears:
        if ".self_attn." in linear.name:
            linear.weight.copy_(pruned.get_submodule(linear.name).weight)
    reached = statistics_of(model, ids, method)
    for linear in linears:
        if not linear.name.endswith(("gate_up_proj", "gate_proj", "up_proj")):
            continue
        if method == "connect" and linear.name.endswith(".up_proj") and family != "up_first":
            continue  # the gate that it then sees is pruned
        weight, acc = linear.weight, reached[linear.name]
        scores = weight.abs() * acc.sqrt()
        lowest = scores.sort(dim=1, stable=True).indices[:, : scores.shape[1] // 2]
        expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)
        zeros = pruned.get_submodule(linear.name).weight == 0
        assert (zeros == expected).float().mean() > 0.9995, linear.name
    other, _ = prune_fast(family, method, "0.5", ids)
    name = "model.layers.0.mlp." + ("gate_up_proj" if family == "phi3" else "up_proj")
    assert not torch.equal(other.get_submodule(name).weight == 0, pruned.get_submodule(name).weight == 0)


def test_resumed_and_streamed_as_in_one_go(tmp_path):
    """A run cut off after a block, resumed, gives the bytes of a live model's run."""
    model = FAMILIES["phi3"]()
    model.save_pretrained(tmp_path / "dense")
    ids = token_ids(model, 3, 24)
    recipe = dict(dataset=ids, prune_method="gated", sparsity_type="2:4", device="cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wanda_fast.pruning.orders.prune_block", stopped_before_block(1))
        with pytest.raises(KeyboardInterrupt):
            wanda_fast.prune(str(tmp_path / "dense"), save_model=tmp_path / "out", **recipe)
    wanda_fast.prune(str(tmp_path / "dense"), save_model=tmp_path / "out", resume=True, **recipe)
    wanda_fast.prune(model, **recipe)
    resumed = type(model).from_pretrained(tmp_path / "out")
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def stopped_before_block(index):
    def prune(block, *rest):
        if block.name.endswith(f".{index}"):
            raise KeyboardInterrupt
        return prune_block(block, *rest)

    return prune


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_triton_finds_the_same_masks(family, monkeypatch):
    """Interpreted where there is no GPU; the halves of a fused projection are strided there."""
    ids, models = token_ids(FAMILIES[family](), 2, 20), {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("WANDA_KERNELS_BACKEND", backend)
        models[backend] = FAMILIES[family]()
        report = wanda_fast.prune(
            models[backend], prune_method="gated", sparsity_type="2:4", dataset=ids, ignore=["*.self_attn.*"]
        )
        assert set(report.backends.values()) == {backend}
    for name in report.linears:
        one, other = (models[backend].get_submodule(name).weight == 0 for backend in models)
        assert (one == other).float().mean() > 0.999, name
