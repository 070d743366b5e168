"""`--resume` on a finished run: recognized by its input and its options."""

from types import SimpleNamespace

import pytest
import torch

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from tests.wanda_fast.output.resume.runs import NBLOCKS, assert_same, copied, fine_tune, masks, resume
from wanda_fast import errors
from wanda_fast.run import inputs, prune_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["streamed", "in memory"])
def held(request, monkeypatch):
    """Whether runs are streamed or in memory."""
    if request.param == "in memory":

        def refuse(*_):
            raise errors.NotStreamableError("the test says so")

        monkeypatch.setattr(inputs, "open_meta_model", refuse)


def measuring(monkeypatch, measure):
    """Tasks are measured by this function, without lm-evaluation-harness."""
    tasks = SimpleNamespace(digest=None, measure=measure)
    monkeypatch.setattr(
        prune_model, "read_tasks", lambda options, _: tasks if options.eval_zero_shot else None
    )


IDS = torch.arange(48).reshape(2, 24) + 3
FINISHED = dict(dataset=IDS, eval_dataset=IDS)


def test_a_finished_run_is_recognized_by_its_input(held, llama, tmp_path, pruned, monkeypatch):
    """The weights and the token ids are compared, not only the options."""
    model, out = copied(llama, tmp_path / "model"), tmp_path / "out"
    first = resume(model, out, **FINISHED)
    pruned.clear()
    again = resume(model, out, **FINISHED)
    assert not pruned and again.linears == first.linears and again.perplexity == first.perplexity
    for change, sentence in (
        (dict(dataset=IDS + 1), "calibration tokens differ"),
        (dict(eval_dataset=IDS + 1), "evaluation tokens differ"),
    ):
        with pytest.raises(errors.ResumeError, match=rf"a finished run of other input \({sentence}\)"):
            resume(model, out, **FINISHED | change)
    with pytest.raises(errors.OutputError, match="not empty .* and holds no finished run of this recipe"):
        resume(model, out, **FINISHED, measure_error=True)
    measuring(monkeypatch, lambda *_: 1 / 0)
    with pytest.raises(errors.OutputError, match="not empty .* and holds no finished run of this recipe"):
        resume(model, out, **FINISHED, eval_zero_shot=True)
    fine_tune(model)
    with pytest.raises(errors.ResumeError, match=r"a finished run of other input \(the model differs\)"):
        resume(model, out, **FINISHED)
    assert not pruned
    resume(model, out, overwrite=True, **FINISHED)
    assert len(pruned) == NBLOCKS


def test_a_run_whose_files_are_gone_or_torn_is_not_finished(held, llama, tmp_path, pruned):
    out = tmp_path / "out"
    resume(llama, out)
    masks(out).unlink()
    resume(llama, out)
    assert masks(out).is_file() and len(pruned) == 2 * NBLOCKS
    report = out / "wanda_fast.json"
    content = report.read_text()
    for spoilt in (content[: len(content) // 2], "[]", "{}", '{"recipe": 3}', "\udcff"):
        report.write_text(spoilt, errors="surrogateescape")
        with pytest.raises(
            errors.OutputError, match="and holds no finished run of this recipe: name another"
        ):
            resume(llama, out)


def test_a_run_that_failed_after_its_save_is_done_again(llama, tmp_path, pruned, monkeypatch):
    """In memory the model is saved before it is evaluated. Without the evaluation the run is not finished."""
    out = tmp_path / "out"
    dense = [{"boolq": {"acc": 0.75}}]
    measuring(monkeypatch, lambda *_: dense.pop())
    with pytest.raises(IndexError):
        resume(llama, out, eval_zero_shot=True)
    measuring(monkeypatch, lambda *_: {"boolq": {"acc": 0.5}})
    report = resume(llama, out, eval_zero_shot=True)
    assert report.zero_shot and len(pruned) == 2 * NBLOCKS
    assert resume(llama, out, eval_zero_shot=True).zero_shot == report.zero_shot
    assert len(pruned) == 2 * NBLOCKS


def test_a_live_model_is_always_pruned(tmp_path):
    """A finished run of another live model says nothing about this one."""
    model, out = FAMILIES["smollm"](), tmp_path / "out"
    options = dict(dataset=token_ids(model, 2, 24), save_model=out, resume=True)
    wanda_fast.prune(model, **options)
    dense = FAMILIES["smollm"]()
    with pytest.raises(errors.OutputError, match="not empty"):
        wanda_fast.prune(dense, **options)
    wanda_fast.prune(dense, overwrite=True, **options)
    assert torch.equal(dense.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_resume_with_nothing_to_resume_begins(llama, tmp_path, unbroken):
    out = tmp_path / "out"
    assert_same(out, unbroken, resume(llama, out))
    # The run is finished, so this one has nothing to do.
    report = resume(llama, out)
    assert_same(out, unbroken, report)
    with pytest.raises(errors.OutputError, match="not empty"):
        resume(llama, out, seed=3)
