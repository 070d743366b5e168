"""The oracle itself: by hand on small matrices, by recomputation on whole models."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn

from benchmarks.jobs import published_pipeline
from benchmarks.jobs.published_pipeline import find_blocks, record_block_calls
from tests.published import nearest_tie, perplexity_published, prune_published, select
from tests.tiny_models import FAMILIES, OF_LINEARS, save_checkpoint, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

SCORES = torch.tensor([[4.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 9.0]])


def pruned_columns(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize(
    ("pattern", "method", "columns"),
    [
        ("0.5", "wanda", [[1, 3], [0, 1]]),  # equal scores: the lower column first
        ("0.74", "wanda", [[1, 3], [0, 1]]),  # int(4 * 0.74) = 2
        ("0.0", "wanda", [[], []]),
        ("2:4", "wanda", [[1, 3], [0, 1]]),
        ("1:4", "connect", [[1, 2, 3], [0, 1, 2]]),  # one kept
        ("3:4", "magnitude", [[1], [0]]),
        ("1:2", "wanda", [[1, 3], [0, 2]]),
        ("0.25", "magnitude", [[1, 2, 3], []]),  # sorted 1 2 3 4 5 5 5 9, position 2: all of at most 3
        ("0.5", "magnitude", [[0, 1, 2, 3], [0, 1, 2]]),  # position 4: ties at the threshold go too
    ],
)
def test_selection_by_hand(pattern, method, columns):
    assert pruned_columns(select(SCORES, pattern, method)) == columns


def test_nearest_tie_by_hand():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [5.0, 6.0, 8.0, 9.0]])
    for pattern, gap in (("0.5", 1 - 6 / 8), ("0.25", 1 - 5 / 6), ("1:2", 1 - 8 / 9)):
        assert nearest_tie(scores, select(scores, pattern, "wanda"), pattern) == pytest.approx(gap)


def test_variant_by_hand():
    # Row sums are 10 and 24, running sums 1 3 6 10 and 5 10 15 24. At alpha 0.4 the limits are 4 and 9.6:
    # two and one weights fall below, and the two ties of that one go with it: 5 of 8, as asked.
    assert pruned_columns(select(SCORES, "0.625", "wanda", use_variant=True)) == [[1, 3], [0, 1, 2]]
    # Asked for 0.75: alpha 0.6 moves the limits to 6 and 14.4, so the first row loses a third weight: 6 of 8.
    assert pruned_columns(select(SCORES, "0.75", "wanda", use_variant=True)) == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("family", OF_LINEARS)
@pytest.mark.parametrize("method", ["wanda", "connect", "gated"])
def test_last_block_agrees_with_a_run_of_the_whole_model(family, method):
    """The last block's statistics again, taken from whole-model forwards rather than from replayed blocks."""
    dense = FAMILIES[family]()
    ids = token_ids(dense, 2, 24)
    pruned = copy.deepcopy(dense)
    masks = prune_published(pruned, ids, method, "0.5")
    blocks = find_blocks(dense)
    for block, source in zip(blocks[:-1], find_blocks(pruned)[:-1], strict=True):
        block.load_state_dict(source.state_dict())
    inputs, outputs = record_whole_model(dense, blocks[-1], ids)
    for name, linear in dense.named_modules():
        if linear not in inputs:
            continue
        x = inputs[linear].double()
        weighed = linear.weight.double().abs() * x.square().sum(0).sqrt()
        if method != "wanda" and name.endswith(("gate_proj", "up_proj")):
            mlp = dense.get_submodule(name.rpartition(".")[0])
            weighed = linear.weight.double().abs() * seen_through_mlp(mlp, linear, outputs, x, method).sqrt()
        cut = weighed.sort(dim=1).values[:, linear.in_features // 2]
        assert torch.equal(masks[name], weighed < cut[:, None]), name


def seen_through_mlp(mlp, linear, outputs, x, method):
    """The score's sum [out, in] of a gated MLP's projection."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = outputs[mlp.gate_up_proj].double().chunk(2, dim=1)
        activation = mlp.activation_fn
    else:
        gate, up = outputs[mlp.gate_proj].double(), outputs[mlp.up_proj].double()
        activation = mlp.act_fn
    if method == "connect":
        of_gate = torch.ones_like(gate).T @ x.square()
        of_up = activation(gate).abs().T @ x.abs()
    else:
        slope = (activation(gate + 1e-6) - activation(gate - 1e-6)) / 2e-6
        of_gate, of_up = (up * slope).square().T @ x.square(), activation(gate).square().T @ x.square()
    if hasattr(mlp, "gate_up_proj"):
        return torch.cat([of_gate, of_up])
    return of_up if linear is mlp.up_proj else of_gate


def record_whole_model(model, block, ids):
    inputs, outputs, handles = {}, {}, []

    def keep(linear, args, output):
        inputs.setdefault(linear, []).append(args[0].reshape(-1, linear.in_features))
        outputs.setdefault(linear, []).append(output.reshape(-1, linear.out_features))

    for module in block.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(keep))
    for row in ids:
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {k: torch.cat(v) for k, v in inputs.items()}, {k: torch.cat(v) for k, v in outputs.items()}


def test_follow_takes_over_another_model_and_chooses_as_before_it():
    alone, other, follower = (FAMILIES["llama2"]() for _ in range(3))
    ids = token_ids(alone, 2, 24)
    masks = prune_published(alone, ids, "wanda", "0.5")
    prune_published(other, ids, "wanda", "0.7")
    followed = prune_published(follower, ids, "wanda", "0.5", follow=other)
    assert all(map(torch.equal, follower.parameters(), other.parameters()))
    differing = {name.split(".")[2] for name in masks if not torch.equal(masks[name], followed[name])}
    assert differing == {"1"}  # block 0 saw the same inputs in both, block 1 did not


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo3"])
def test_tiny_models_tell_kinds_of_blocks_apart(family, monkeypatch):
    """Replaying block 0's arguments for every block is the mistake to expose: it must change masks here."""
    model, mistaken = FAMILIES[family](), FAMILIES[family]()
    ids = token_ids(model, 2, 24)
    right = prune_published(model, ids, "wanda", "0.5")

    def record_block_0_only(*args, **options):
        hidden, kwargs = record_block_calls(*args, **options)
        return hidden, [kwargs[0]] * len(kwargs)

    monkeypatch.setattr(published_pipeline, "record_block_calls", record_block_0_only)
    wrong = prune_published(mistaken, ids, "wanda", "0.5")
    differing = [name for name in right if not torch.equal(right[name], wrong[name])]
    assert len(differing) > 3 and not any(".layers.0." in name for name in differing)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "connect", "gated"])
@pytest.mark.parametrize("pattern", ["0.3", "0.7", "2:4", "1:4", "4:8"])
def test_counts(method, pattern):
    model = FAMILIES["llama3"]()
    masks = prune_published(model, token_ids(model, 2, 16), method, pattern)
    assert len(masks) == 14
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight == 0, mask)
        if ":" in pattern:
            kept, group = map(int, pattern.split(":"))
            assert (mask.reshape(-1, group).sum(1) == group - kept).all()
        elif method == "magnitude":
            assert mask.sum() == int(mask.numel() * float(pattern)) + 1
        else:
            assert (mask.sum(1) == int(mask.shape[1] * float(pattern))).all()


@pytest.mark.parametrize("ratio", ["0.3", "0.5", "0.7"])
def test_variant_reaches_the_ratio_unevenly(ratio):
    model = FAMILIES["qwen2"]()
    masks = prune_published(model, token_ids(model, 2, 16), "wanda", ratio, use_variant=True)
    for mask in masks.values():
        assert abs(mask.float().mean() - float(ratio)) < 0.01
        assert mask.sum(1).unique().numel() > 1


def test_connect_changes_up_proj_alone_and_the_gate_option_matters():
    masks = {}
    for key, method, gate in (
        ("wanda",) * 2 + ("raw",),
        ("raw", "connect", "raw"),
        ("act", "connect", "activated"),
    ):
        model = FAMILIES["llama2"]()
        masks[key] = prune_published(model, token_ids(model, 2, 16), method, "2:4", connect_gate=gate)
    first_up = "model.layers.0.mlp.up_proj"
    for name in masks["wanda"]:
        if name.startswith("model.layers.0.") and name != first_up:
            assert torch.equal(masks["wanda"][name], masks["act"][name]), name
    assert not torch.equal(masks["wanda"][first_up], masks["act"][first_up])
    assert not torch.equal(masks["raw"][first_up], masks["act"][first_up])


def test_perplexity_by_hand():
    model = FAMILIES["llama2"]()
    ids = token_ids(model, 1, 23)[0]  # two windows of 10; the rest is dropped
    total = 0.0
    for start in (0, 10):
        window = ids[start : start + 10]
        logits = model(window[None]).logits[0].double()
        losses = [logits[i].logsumexp(0) - logits[i, window[i + 1]] for i in range(9)]
        total += float(sum(losses)) / 9
    assert perplexity_published(model, ids[None], 10) == pytest.approx(math.exp(total / 2), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_is_reproducible_saves_and_loads(family, tmp_path):
    model = FAMILIES[family]()
    assert all(map(torch.equal, model.parameters(), FAMILIES[family]().parameters()))
    linears = [m for m in find_blocks(model).modules() if isinstance(m, nn.Linear)]
    in_linears = sum(m.weight.numel() for m in linears) / sum(
        p.numel() for p in find_blocks(model).parameters()
    )
    assert (in_linears > 0.5) == (family in OF_LINEARS)

    text = "The quick brown fox jumps over the lazy dog. " * 20
    save_checkpoint(model, tmp_path, text)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :32]
    assert ids.max() < model.config.vocab_size
    assert tokenizer.decode(ids[0]) == text[: len(tokenizer.decode(ids[0]))]
    assert torch.equal(model(ids).logits, loaded(ids).logits)
