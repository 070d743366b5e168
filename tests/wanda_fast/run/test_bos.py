"""BOS before every window: by trial, on request, and not at all."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import wanda_fast
from tests import tiny_models
from wanda_fast import errors
from wanda_fast.run import bos

TEXT = "The quick brown fox jumps over the lazy dog, and nobody asks where it came from. " * 40
BOS = 0


@pytest.fixture
def folder(tmp_path):
    def saved(family):
        tiny_models.save_checkpoint(tiny_models.build(family), tmp_path / "model", TEXT)
        (tmp_path / "text.txt").write_text(TEXT)
        return tmp_path / "model"

    return saved


def options(folder, **others):
    text = str(folder.parent / "text.txt")
    return dict(dataset=text, eval_dataset=text, nsamples=3, seqlen=32, eval_windows=4) | others


def windows_with_bos(folder):
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[0]
    windows = ids[: 4 * 32].view(4, 32).clone()
    windows[:, 0] = BOS
    return windows


@pytest.mark.parametrize("streamed", [True, False])
def test_the_trial_measures_one_window_twice(folder, streamed, monkeypatch):
    """Streamed, the trial reads the model once; the figures are those of the whole model."""
    path, tried = folder("gemma3"), []
    own = bos.trial
    monkeypatch.setattr(bos, "trial", lambda *given: tried.append((own(*given), given[-1])) or tried[-1][0])
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    wanda_fast.prune(path if streamed else model, tokenizer=tokenizer, **options(path))
    model = AutoModelForCausalLM.from_pretrained(path)
    [(found, window)] = tried
    with_bos = torch.cat([torch.tensor([BOS]), window[1:]])
    expected = [wanda_fast.perplexity(model, each, len(each)) for each in (window, with_bos)]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("trial", "begins"), [((100.0, 81.0), False), ((100.0, 79.0), True), ((100.0, float("nan")), False)]
)
def test_bos_is_kept_if_it_lowers_the_perplexity_by_more_than_a_fifth(folder, trial, begins, monkeypatch):
    path = folder("gemma3")
    monkeypatch.setattr(bos, "trial", lambda *_: trial)
    report = wanda_fast.prune(path, **options(path))
    expected = wanda_fast.prune(path, **options(path), bos="always" if begins else "never")
    assert report.calibration == expected.calibration and report.perplexity == expected.perplexity
    assert report.calibration["bos"] == (BOS if begins else None)
    assert ("beginning with BOS" in report.perplexity["protocol"]) == begins


def test_always_replaces_the_first_token_of_each_window(folder):
    path = folder("llama2")
    found = wanda_fast.prune(path, **options(path), bos="always")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert found.perplexity["dense"] == pytest.approx(
        wanda_fast.perplexity(model, windows_with_bos(path), 32), rel=1e-5
    )
    assert found.calibration["sha256"] != wanda_fast.prune(path, **options(path)).calibration["sha256"]


def test_models_of_published_tables_and_token_ids_are_not_tried(folder, monkeypatch):
    monkeypatch.setattr(bos, "trial", lambda *_: pytest.fail("tried"))
    llama = folder("llama2")
    assert wanda_fast.prune(llama, **options(llama)).calibration["bos"] is None
    gemma = folder("gemma3")
    ids = torch.full((2, 16), 5)
    wanda_fast.prune(gemma, dataset=ids, eval_dataset=ids, seqlen=16)


def test_a_model_too_large_to_read_twice_is_not_tried(folder, monkeypatch):
    monkeypatch.setattr(bos, "trial", lambda *_: pytest.fail("tried"))
    monkeypatch.setattr(bos, "LARGEST_TRIAL", 1000)
    path = folder("gemma3")
    report = wanda_fast.prune(path, **options(path))
    assert report.calibration["bos"] is None
    assert any("is not tried on a model of 0 billion weights" in sentence for sentence in report.warnings)


def test_bos_that_cannot_be_is_refused(folder):
    path, ids = folder("gemma3"), torch.full((2, 16), 5)
    with pytest.raises(errors.CalibrationError, match="token ids are used as they are"):
        wanda_fast.prune(path, dataset=ids, bos="always")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token = None
    with pytest.raises(errors.CalibrationError, match="has no token that begins a text"):
        wanda_fast.prune(path, tokenizer=tokenizer, **options(path), bos="always")


def test_bos_outside_the_vocabulary(folder, monkeypatch):
    """A tokenizer can have tokens that its model has no embedding for."""
    monkeypatch.setattr(bos, "trial", lambda *_: pytest.fail("tried"))
    path = folder("gemma3")
    tokenizer = AutoTokenizer.from_pretrained(path)
    vocabulary = AutoModelForCausalLM.from_pretrained(path).config.vocab_size
    tokenizer.add_tokens([f"<added{number}>" for number in range(vocabulary)])
    tokenizer.bos_token = f"<added{vocabulary - 1}>"
    assert wanda_fast.prune(path, tokenizer=tokenizer, **options(path)).calibration["bos"] is None
    with pytest.raises(errors.CalibrationError, match=f"is outside the model's vocabulary of {vocabulary}"):
        wanda_fast.prune(path, tokenizer=tokenizer, **options(path), bos="always")


def test_a_trial_without_memory_is_one_sentence(folder, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bos, "_by_blocks", fail)
    path = folder("gemma3")
    with pytest.raises(errors.OutOfMemoryError, match="pass bos always or never"):
        wanda_fast.prune(path, **options(path))


def test_another_bos_is_another_run(folder, tmp_path):
    path = folder("gemma3")
    wanda_fast.prune(path, save_model=tmp_path / "out", **options(path), bos="never")
    with pytest.raises(errors.OutputError, match="not empty"):
        wanda_fast.prune(path, save_model=tmp_path / "out", **options(path), bos="always", resume=True)
