"""The GPU run: its rehearsal from end to end, and that nothing is timed before the tests have passed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import pages
from benchmarks.core import machine, results, tables
from benchmarks.core.catalogue import BENCHMARKS
from tools.gpu import __main__ as gpu
from tools.gpu import steps

WITHOUT = ("typer", "rich", "datasets", "gguf", "hypothesis", "matplotlib")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(folder, what was printed) of `make bench-gpu` without packages that a GPU machine may lack."""
    folder = tmp_path_factory.mktemp("gpu")
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
    command = [sys.executable, "-m", "tools.gpu", "--out", str(folder / "out"), "--minutes", "30"]
    paths = os.pathsep.join([str(machine.ROOT), str(machine.ROOT / "kernels"), str(bare)])
    settings = {"WANDA_BENCH_REHEARSE": "1", "WANDA_BENCH_COMMIT": "abc1234", "PYTHONPATH": paths}
    settings |= {"OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout


def test_the_rehearsal_reaches_every_step(rehearsal):
    folder, said = rehearsal
    checks = json.loads((folder / "checks.json").read_text())
    assert checks["commit"] == "abc1234" and checks["trusted"]
    assert {step["name"]: step["problems"] for step in checks["steps"]} == {name: [] for name in gpu.STEPS}
    run = results.read(folder)
    assert {row.operation for row in run.rows} == {each.operation for each in BENCHMARKS.values()}
    assert {row.provider for row in run.rows if row.operation == "add_sq_norm_"} >= {"triton", "torch"}
    assert all(row.status == "ok" and row.commit == "abc1234" for row in run.rows)
    job = json.loads((folder / "job-tiny-2of4.json").read_text())
    assert {each["pipeline"] for each in job["runs"]} == {"published", "wanda_fast"}
    assert len(list(folder.iterdir())) <= 8  # as many as come back from a lent machine
    page = (folder / "run.md").read_text()
    assert tables.REHEARSAL in page and "| tests | " in page and "| tests | " in said
    assert "| prune_nm_ | 2x32 |" in page and "### tiny, 2 x 32 tokens, 2:4" in page


def test_a_rehearsal_is_never_published(rehearsal, tmp_path):
    shutil.copytree(rehearsal[0], tmp_path / "2026-01-01-x")
    with pytest.raises(ValueError, match="is no measurement"):
        pages.speed(tmp_path)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A run whose steps are only noted in `run.done`; a test sets what they answer in `run.problems`."""
    monkeypatch.setenv("WANDA_BENCH_REHEARSE", "1")
    monkeypatch.setenv("WANDA_BENCH_COMMIT", "abc1234")
    run = steps.GpuRun.open(tmp_path, tmp_path, float("inf"))
    run.done, run.problems = [], {}

    def noted(name):
        return lambda run: run.done.append(name) or run.problems.get(name, [])

    for name in gpu.STEPS:
        monkeypatch.setitem(gpu.STEPS, name, noted(name))
    return run


def test_nothing_is_timed_where_a_test_has_failed(run):
    run.problems["tests"] = ["test_prune_nm.py: exit code 1: 1 failed"]
    assert gpu.execute(run, list(gpu.STEPS)) == 1
    assert run.done == ["build", "tests", "sanitize"]
    page = (run.out / "run.md").read_text()
    assert "**FAILED** | test_prune_nm.py: exit code 1: 1 failed |" in page
    assert page.count("nothing is timed before the tests have passed") == 2
    assert page.count("Not measured.") == 2


def test_timing_alone_needs_tests_that_passed_at_the_same_commit(run, monkeypatch):
    assert gpu.execute(run, ["jobs"]) == 0 and run.done == ["build", "tests", "jobs"]
    again = steps.GpuRun.open(run.out, run.work, run.deadline)
    again.done, again.problems = [], {}
    assert gpu.execute(again, ["bench"]) == 0 and again.done == ["build", "bench"]
    monkeypatch.setenv("WANDA_BENCH_COMMIT", "def5678")
    assert not steps.GpuRun.open(run.out, run.work, run.deadline).trusted


def test_a_command_that_hangs_is_ended_with_its_children(run):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    run.deadline = time.monotonic() + 1
    command = run.start("slow", sys.executable, "-c", code, limit_s=60)
    assert command.problems() == ["slow: out of time: no output"]
    assert command.process.returncode == -signal.SIGKILL


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_bench_gpu_without_a_gpu_says_so():
    environment = {name: value for name, value in os.environ.items() if name != "WANDA_BENCH_REHEARSE"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = ["make", "-C", str(machine.ROOT), "bench-gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and "torch sees no CUDA GPU here" in done.stderr


def test_unknown_steps_are_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--only", "prune_cols"])
    assert stopped.value.code == 2 and "prune_cols" in capsys.readouterr().err


def test_the_commit_of_an_exported_tree(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDA_BENCH_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.describe("cpu")["commit"] == machine.UNKNOWN
    (tmp_path / "COMMIT").write_text("abc1234\n")
    assert machine.describe("cpu")["commit"] == "abc1234"
    monkeypatch.setenv("WANDA_BENCH_COMMIT", "def5678")
    assert machine.describe("cpu")["commit"] == "def5678"
