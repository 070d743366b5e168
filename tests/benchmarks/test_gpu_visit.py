"""The visit to a GPU: its rehearsal from end to end."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from benchmarks import gpu_visit, machine, readme, tables
from benchmarks.rows import TEST_FAILED
from benchmarks.visit import (
    operands,
    proof,
    publish,
)
from wanda_kernels.dispatch.backends import TABLE

WITHOUT = ("typer", "rich", "datasets", "gguf", "hypothesis", "matplotlib")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(folder, what was printed) of `make bench-gpu` where torch, triton, transformers and pytest are all."""
    folder = tmp_path_factory.mktemp("visit")
    bare = folder / "bare"
    bare.mkdir()
    blocker = (
        "from functools import partial\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        f"    return None if name.partition('.')[0] in {WITHOUT} else find(name, path, target)\n"
        "PathFinder.find_spec = partial(find_spec)\n"  # not a function: pytest keeps it in a class
    )
    (bare / "sitecustomize.py").write_text(blocker)
    command = [sys.executable, "-m", "benchmarks.gpu_visit", "--out", str(folder / "out"), "--minutes", "30"]
    paths = os.pathsep.join([str(machine.ROOT), str(machine.ROOT / "kernels"), str(bare)])
    settings = {"WANDA_BENCH_REHEARSE": "1", "WANDA_BENCH_COMMIT": "abc1234", "PYTHONPATH": paths}
    settings |= {"OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout


def test_the_rehearsal_reaches_every_part(rehearsal):
    folder, said = rehearsal
    data = json.loads((folder / "visit.json").read_text())
    assert data["rehearsal"] and data["machine"]["commit"] == "abc1234"
    states = {name.split()[0]: part["state"] for name, part in data["parts"].items()}
    assert states.keys() == {"truth", "rates", "bench", "job", "compiled"}
    assert set(states.values()) == {"done"}, states
    assert {run["pipeline"] for run in data["jobs"]["tiny/2:4/wanda"]["runs"]} == {"published", "wanda_fast"}
    measured = {report["operation"] for report in data["reports"].values()}
    assert measured >= {"prune_nm_", "prune_rows_", "add_coactivation_", "add_sq_norm_", "dispatch"}
    assert {row["provider"] for row in data["reports"]["add_sq_norm"]["rows"]} >= {"torch.compile", "triton"}
    assert data["proof"]["truth triton prune_nm_"]["passed"] == len(operands.RECIPES)
    assert data["proof"]["pytest -m gpu prune_nm_"]["planned"] > 100  # found, and skipped without a GPU
    assert len(list(folder.iterdir())) <= 8  # as many as come back from a lent machine
    with (folder / "rows.csv").open() as file:
        assert {row["machine_rehearsal"] for row in csv.DictReader(file)} == {"True"}
    for page in ((folder / "visit.md").read_text(), said):
        assert tables.REHEARSAL in page and page.count("| not measured |") == 9


def test_the_rehearsal_refuses_speed_ups_of_the_operation_it_spoils(rehearsal):
    folder, said = rehearsal
    checks = json.loads((folder / "visit.json").read_text())["proof"]
    assert {name for name in TABLE if proof.doubt(checks, name)} == {"prune_matrix_"}
    with (folder / "rows.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] in ("triton", "cpu")]
    spoilt = [row for row in rows if row["operation"] == "prune_matrix_"]
    assert spoilt and all(row["status"] == TEST_FAILED and "error" in row["note"] for row in spoilt)
    assert not any(row["over_torch"] or row["over_published"] or row["time_ms"] for row in spoilt)
    assert all(row["over_torch"] for row in rows if row["operation"] == "prune_rows_")
    assert "**test failed**: truth triton" in said


def test_a_rehearsal_is_never_published(rehearsal, tmp_path):
    folder, _ = rehearsal
    with pytest.raises(publish.PublishError, match="is no measurement"):
        publish.publish([folder / "visit.json"], tmp_path)
    report = json.loads((folder / "visit.json").read_text())["reports"]["prune_nm"]
    (tmp_path / "results" / "x").mkdir(parents=True)
    (tmp_path / "results" / "x" / "prune_nm.json").write_text(json.dumps(report))
    pages = [tmp_path / "README.md", tmp_path / "speed.md"]
    for page in pages:
        page.write_text("<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\n")
    arguments = ["--readme", pages[0], "--speed", pages[1], "--results", tmp_path / "results"]
    result = CliRunner().invoke(readme.app, list(map(str, arguments)))
    assert result.exit_code == 2 and "no measurement" in result.output
    assert all("old" in page.read_text() for page in pages)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_bench_gpu_without_a_gpu_says_so():
    environment = {name: value for name, value in os.environ.items() if name != "WANDA_BENCH_REHEARSE"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = ["make", "-C", str(machine.ROOT), "bench-gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and "torch sees no CUDA GPU here" in done.stderr


def test_unknown_parts_are_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_visit.main(["--only", "prune_cols"])
    assert stopped.value.code == 2 and "prune_cols" in capsys.readouterr().err


def test_the_commit_of_an_exported_tree(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDA_BENCH_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.describe("cpu")["commit"] == machine.UNKNOWN
    (tmp_path / "COMMIT").write_text("abc1234\n")
    assert machine.describe("cpu")["commit"] == "abc1234"
    monkeypatch.setenv("WANDA_BENCH_COMMIT", "def5678")
    assert machine.describe("cpu")["commit"] == "def5678"
