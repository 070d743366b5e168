"""Methods that bring a statistic of their own, as a user would write them."""

import pytest
import torch

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import errors
from wanda_fast.model.architecture import find_blocks
from wanda_fast.pruning import registry
from wanda_fast.pruning.statistics import OutputStatistic, SquaredNorm, Statistic

pytestmark = pytest.mark.usefixtures("one_thread")


class LargestInput(Statistic):
    """acc[j] = the largest abs(x[t, j]) over all tokens."""

    operation = "largest_input"

    def __init__(self, linear):
        self.acc = torch.zeros(linear.in_features)

    def add(self, x):
        torch.maximum(self.acc, x.flatten(0, -2).abs().amax(0).float(), out=self.acc)


class OutputNorm(OutputStatistic):
    """acc[i, j] = (sum of y[t, i]^2) * (sum of x[t, j]^2), where y is the linear's output."""

    operation = "output_norm"

    def __init__(self, linear):
        self.reads = (linear.module,)
        self.of_inputs, self.of_outputs = (torch.zeros(n) for n in linear.weight.shape[::-1])

    def add_outputs(self, x, outputs, others, sq_norm):
        assert not others and sq_norm is None
        self.of_inputs += x.flatten(0, -2).float().square().sum(0)
        self.of_outputs += outputs[0].flatten(0, -2).float().square().sum(0)

    @property
    def acc(self):
        return self.of_outputs[:, None] * self.of_inputs


@pytest.fixture
def methods():
    before = dict(registry.METHODS)

    @wanda_fast.register_method("largest")
    class Largest(wanda_fast.Method):
        def statistic(self, linear):
            return LargestInput(linear)

        def score(self, weight, acc):
            return weight.float().abs() * acc

    @wanda_fast.register_method("mixed")
    class Mixed(wanda_fast.Method):
        """Two kinds in one block, of linears that read one tensor; None for a linear that needs none."""

        def statistic(self, linear):
            if linear.name.endswith("q_proj"):
                return LargestInput(linear)
            if linear.name.endswith("v_proj"):
                return OutputNorm(linear)
            return SquaredNorm(linear)

    yield
    registry.METHODS.clear()
    registry.METHODS.update(before)


def seen_by(model, ids):
    """The first block's linears: name -> (inputs, outputs) of all tokens."""
    seen = {}
    for linear in find_blocks(model)[0].linears:
        linear.module.register_forward_hook(
            lambda _, args, output, name=linear.name: seen.update(
                {name: (args[0].flatten(0, -2), output.flatten(0, -2))}
            )
        )
    model(ids)
    return seen


def kept_lowest(weight, scores):
    """The mask of 2:4 by a sort of its own: True where the weight stays."""
    groups = scores.unflatten(1, (-1, 4))
    ranks = groups.argsort(dim=2, stable=True).argsort(dim=2)
    return (ranks >= 2).flatten(1)


@pytest.mark.parametrize("sequential", ["block", "linear"])
def test_a_statistic_of_the_input(methods, sequential):
    model, dense = FAMILIES["llama2"](), FAMILIES["llama2"]()
    ids = token_ids(model, 4, 32)
    report = wanda_fast.prune(
        model, dataset=ids, prune_method="largest", sparsity_type="2:4", sequential=sequential, batch_size=2
    )
    seen = seen_by(dense, ids)
    for name in ("q_proj", "k_proj", "v_proj"):  # their input is the same dense tensor in either order
        full = f"model.layers.0.self_attn.{name}"
        weight = dense.get_submodule(full).weight
        scores = weight.abs() * seen[full][0].abs().amax(0)
        assert torch.equal(model.get_submodule(full).weight != 0, kept_lowest(weight, scores))
        assert report.linears[full].statistic == "largest_input"
        assert report.linears[full].statistic_backend == "torch"
    assert report.sparsity == 0.5


def test_linears_that_read_one_tensor_share_a_statistic_of_one_kind_alone(methods):
    model, dense = FAMILIES["llama2"](), FAMILIES["llama2"]()
    ids = token_ids(model, 3, 16)
    report = wanda_fast.prune(model, dataset=ids, prune_method="mixed", sparsity_type="2:4", batch_size=2)
    seen, prefix = seen_by(dense, ids), "model.layers.0.self_attn"
    statistics = {
        name: report.linears[f"{prefix}.{name}"].statistic for name in ("q_proj", "k_proj", "v_proj")
    }
    assert statistics == {"q_proj": "largest_input", "k_proj": "add_sq_norm_", "v_proj": "output_norm"}
    wanted = {
        "q_proj": lambda x, y: x.abs().amax(0).sqrt(),
        "k_proj": lambda x, y: x.square().sum(0).sqrt(),
        "v_proj": lambda x, y: (y.square().sum(0)[:, None] * x.square().sum(0)).sqrt(),
    }
    for name, root in wanted.items():
        weight = dense.get_submodule(f"{prefix}.{name}").weight
        scores = weight.abs() * root(*seen[f"{prefix}.{name}"])
        kept = model.get_submodule(f"{prefix}.{name}").weight != 0
        assert (kept == kept_lowest(weight, scores)).float().mean() > 0.999  # sums in another order
    assert report.sparsity == 0.5


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        (lambda weight, acc: acc, r"method 'odd' gave a score of shape \[64\] for a weight \[64, 64\]"),
        (lambda weight, acc: weight * float("nan"), r"method 'odd' gave NaN for a weight \[64, 64\]"),
    ],
)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_a_score_that_is_none_is_refused(methods, score, sentence, pattern):
    odd = type("Odd", (wanda_fast.Method,), {"score": lambda self, weight, acc: score(weight, acc)})
    wanda_fast.register_method("odd")(odd)
    model = FAMILIES["llama2"]()
    with pytest.raises(errors.ScoreError, match=sentence):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), prune_method="odd", sparsity_type=pattern)


def test_a_statistic_may_be_negative_where_no_root_is_taken(methods):
    class Sum(Statistic):
        def __init__(self, linear):
            self.acc = torch.zeros(linear.in_features)

        def add(self, x):
            self.acc += x.flatten(0, -2).float().sum(0)

    @wanda_fast.register_method("signed")
    class Signed(wanda_fast.Method):
        def statistic(self, linear):
            return Sum(linear)

        def score(self, weight, acc):
            return (weight.float() * acc).abs()

    model = FAMILIES["llama2"]()
    report = wanda_fast.prune(model, dataset=token_ids(model, 2, 16), prune_method="signed")
    assert report.sparsity == 0.5


def test_the_variant_is_not_ignored_without_a_word(methods):
    model = FAMILIES["llama2"]()
    report = wanda_fast.prune(
        model, dataset=token_ids(model, 2, 16), prune_method="largest", use_variant=True
    )
    assert any("--use_variant has no effect on largest" in sentence for sentence in report.warnings)


def test_a_built_in_name_stays_the_built_in_methods(tmp_path, methods):
    with pytest.raises(ValueError, match="'wanda' is built in: register Odd under another name"):
        wanda_fast.register_method("wanda")(type("Odd", (wanda_fast.Method,), {}))
    assert registry.METHODS["wanda"].__name__ == "Wanda"
    plugin = tmp_path / "statistics.py"
    plugin.write_text("mine = True")
    registry.load_plugin(str(plugin))
    import statistics

    assert not hasattr(statistics, "mine")
