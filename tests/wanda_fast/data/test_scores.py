"""Perplexity and the distance of a pruned model to the dense one, against a computation on whole logits."""

import math

import pytest
import torch
from torch import Tensor

import wanda_fast
from tests import tiny_models
from wanda_fast.data import scores
from wanda_fast.data.scores import Scores, divergence, score, summary


def direct(dense: Tensor, pruned: Tensor, windows: Tensor) -> dict[str, float]:
    """From whole logits `[nwindows, seqlen, vocabulary]`, in fp64."""
    p, q = (each[:, :-1].double().log_softmax(-1) for each in (dense, pruned))
    loss = {
        name: -each.gather(-1, windows[:, 1:, None]).mean().item()
        for name, each in (("dense", p), ("pruned", q))
    }
    return {
        "dense": math.exp(loss["dense"]),
        "pruned": math.exp(loss["pruned"]),
        "ratio": math.exp(loss["pruned"] - loss["dense"]),
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "flips": (dense[:, :-1].argmax(-1) != pruned[:, :-1].argmax(-1)).double().mean().item(),
    }


@pytest.mark.parametrize("at_once", [1, 6, 10_000])
def test_scores_are_those_of_whole_logits(at_once):
    torch.manual_seed(0)
    windows = torch.randint(0, 97, (3, 12))
    dense = torch.randn(3, 12, 97) * 4
    pruned = dense + torch.randn(3, 12, 97)
    # Ties of the first choice, which both models break alike.
    dense[:, 5], pruned[:, 5] = dense[:, 5].round(), dense[:, 5].round()
    logits_of = {"dense": lambda tokens: dense[:, tokens], "pruned": lambda tokens: pruned[:, tokens]}
    found = summary(score(windows, logits_of, at_once))
    expected = direct(dense, pruned, windows)
    assert 0 < expected["flips"] < 1
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_rows_beyond_the_cache(monkeypatch):
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(2, 7, 50).log_softmax(-1) for _ in range(2))
    whole = divergence(log_p, log_q)
    monkeypatch.setattr(scores, "VALUES_IN_CACHE", 3 * 50)
    assert torch.equal(divergence(log_p, log_q), whole) and whole.shape == (2, 7)


def test_words_that_no_model_can_say_add_nothing():
    logits = torch.tensor([[[1.0, 2.0, -torch.inf]]])
    other = torch.tensor([[[2.0, 1.0, -torch.inf]]])
    found = divergence(logits.log_softmax(-1), other.log_softmax(-1))
    two_words = divergence(logits[..., :2].log_softmax(-1), other[..., :2].log_softmax(-1))
    assert torch.equal(found, two_words) and found.item() > 0
    # A word that only the pruned model cannot say is infinitely far.
    impossible = torch.tensor([[[1.0, -torch.inf, -torch.inf]]])
    assert divergence(logits.log_softmax(-1), impossible.log_softmax(-1)).item() == math.inf


def test_a_model_is_no_distance_from_itself_and_losses_too_large_are_infinite():
    logits = torch.zeros(1, 5, 3)
    logits[..., 0] = 1e4
    windows = torch.ones(1, 5, dtype=torch.int64)
    same = {"dense": lambda tokens: logits[:, tokens], "pruned": lambda tokens: logits[:, tokens]}
    found = summary(score(windows, same, 2))
    assert found == {"dense": math.inf, "pruned": math.inf, "ratio": 1.0, "kl": 0.0, "flips": 0.0}
    assert summary({"dense": Scores([0.0])}) == {"dense": 1.0}


@pytest.mark.parametrize("family", ["llama2", "gemma2", "opt_350m", "mixtral"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_run_reports_the_distance_to_its_dense_model(family, streamed, tmp_path):
    """Gemma 2 caps its logits and OPT-350m projects hidden states, by code that only their forward has."""
    model = tiny_models.build(family)
    model.save_pretrained(tmp_path / "dense")
    ids, windows = tiny_models.token_ids(model, 2, 16), tiny_models.token_ids(model, 5, 16, seed=1)
    options = dict(dataset=ids, eval_dataset=windows, seqlen=16, sparsity_type="2:4")
    with torch.no_grad():
        dense = model(windows).logits
        found = wanda_fast.prune(
            tmp_path / "dense" if streamed else model, save_model=tmp_path / "pruned", **options
        ).perplexity
        pruned = type(model).from_pretrained(tmp_path / "pruned")(windows).logits
    found = {key: value for key, value in found.items() if not isinstance(value, str)}
    assert found == pytest.approx(direct(dense, pruned, windows), rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_the_error_of_each_block_is_that_of_its_output(tmp_path):
    model = tiny_models.build("llama2")
    model.save_pretrained(tmp_path / "dense")
    ids, windows = tiny_models.token_ids(model, 2, 16), tiny_models.token_ids(model, 5, 16, seed=1)
    report = wanda_fast.prune(
        tmp_path / "dense", dataset=ids, eval_dataset=windows, seqlen=16, save_model=tmp_path / "pruned"
    )
    pruned = type(model).from_pretrained(tmp_path / "pruned")
    # The last hidden states that transformers returns are behind the final norm.
    dense, other = (each(windows, output_hidden_states=True).hidden_states[1] for each in (model, pruned))
    expected = ((other - dense).square().sum() / dense.square().sum()).item()
    assert list(report.block_output_error) == ["model.layers.0", "model.layers.1"]
    assert report.block_output_error["model.layers.0"] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert report.block_output_error["model.layers.1"] > 0
