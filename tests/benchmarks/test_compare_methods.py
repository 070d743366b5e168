"""The table of methods of `make prune`."""

import runpy
import sys

import pytest


def test_bad_input_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_methods", "--model", "no/such/model"])
    monkeypatch.delitem(sys.modules, "benchmarks.compare_methods", raising=False)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("benchmarks.compare_methods", run_name="__main__")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "no/such/model" in said and "Traceback" not in said
