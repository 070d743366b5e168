"""A run that is resumed under other versions says so: they may give other masks."""

import json
from importlib import metadata

import pytest

import wanda_fast
from tests.wanda_fast.output.resume.runs import partial, resume
from wanda_fast import errors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def other_version(monkeypatch):
    """A function that gives an installed package another version."""
    version, others = metadata.version, {}
    monkeypatch.setattr(metadata, "version", lambda name: others.get(name) or version(name))
    return others.__setitem__


def test_the_report_names_versions_and_blocks(llama, broken_off, other_version, caplog):
    now = metadata.version("transformers")
    other_version("transformers", "5.0.99")
    out = broken_off()
    other_version("transformers", now)
    report = resume(llama, out)
    said = f"3 blocks were pruned by other versions, whose masks may differ: transformers 5.0.99, now {now}"
    assert report.warnings == [said] and said in caplog.text
    assert json.loads((out / "wanda_fast.json").read_text())["warnings"] == [said]


def test_a_run_that_is_resumed_twice(llama, broken_off, other_version, monkeypatch):
    """The second resume has the versions of the first one, and still says what the first three blocks had."""
    now = metadata.version("torch")
    other_version("torch", "2.9.9")
    out = broken_off()
    other_version("torch", now)

    def stopped(*_):
        raise errors.InterruptedRunError

    with monkeypatch.context() as patch, pytest.raises(errors.InterruptedRunError):
        patch.setattr("wanda_fast.output.streamed.StreamedOutput.finish", stopped)
        resume(llama, out)
    assert len(list(partial(out).glob("block-*.json"))) == 5
    [said] = resume(llama, out).warnings
    assert said.startswith("3 blocks") and f"torch 2.9.9, now {now}" in said


def test_the_same_versions_and_other_packages_are_no_warning(llama, broken_off, other_version):
    out = broken_off()
    other_version("datasets", "0.1")
    assert resume(llama, out).warnings == []


def test_a_run_from_the_beginning_is_no_warning(llama, broken_off, other_version):
    out = broken_off()
    other_version("torch", "99.0")
    assert resume(llama, out, overwrite=True, seed=0).warnings != []
    report = wanda_fast.prune(
        str(llama), dataset="text.txt", nsamples=2, seqlen=24, save_model=out, overwrite=True
    )
    assert report.warnings == []
