"""The visit to a GPU: its rehearsal from end to end, and what it must refuse."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import bench_add_sq_norm, bench_prune_nm, gpu_visit, machine, model_table, readme, tables
from benchmarks.providers import PUBLISHED, TORCH, Provider
from benchmarks.roofs import Roofs
from benchmarks.rows import OK, TEST_FAILED, Row
from benchmarks.visit import (
    choices,
    commands,
    goals,
    operands,
    proof,
    publish,
    pytest_outcomes,
    sanitizer,
    truth,
)
from benchmarks.visit.commands import Command, Ended
from wanda_kernels import reference
from wanda_kernels.backends import TABLE

ROOFS = Roofs(bytes_per_s=4e12, flops_per_s=8e14, copy="a copy", matmul="a matmul")
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
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}\nold\n{readme.END}\n")
    arguments = ["--readme", str(page), "--results", str(tmp_path / "results")]
    result = CliRunner().invoke(readme.app, arguments)
    assert result.exit_code == 2 and "no measurement" in result.output and "old" in page.read_text()


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_bench_gpu_without_a_gpu_says_so():
    environment = {name: value for name, value in os.environ.items() if name != "WANDA_BENCH_REHEARSE"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = ["make", "-C", str(machine.ROOT), "bench-gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and "torch sees no CUDA GPU here" in done.stderr


def row(provider, time_ms, operation="prune_nm_", shape="4096x4096", setting="2:4", **more):
    return Row(operation, "", shape, "bfloat16", setting, provider, True, OK, time_ms=time_ms, **more)


def report(*rows):
    roofs = asdict(ROOFS)
    facts = {"device": "cuda", "gpu": "G", "commit": "abc", "date": "2027-01-02 03:04 UTC"}
    facts |= dict.fromkeys(("driver_version", "clocks.sm", "clocks.max.sm", "cuda", "torch", "triton"), "?")
    facts |= {"python": "3.12", "load_before": 0.0, "cpu": "C", "cores": 1, "threads": 1, "openmp": ""}
    facts |= {"cpu_capability": "", "capability": "9.0"}
    rows = [asdict(each) for each in rows]
    return {"operation": "prune_nm_", "quick": False, "machine": facts, "roofs": roofs} | {
        "not_run": {},
        "rows": rows,
    }


def visit(checks, *rows, **more):
    one = report(*rows)
    proof_of = {f"{each['how']} {each['operation']}": each for each in checks}
    data = {"machine": one["machine"], "rehearsal": False, "notes": [], "parts": {}, "jobs": {}}
    return data | {"rates": {"roofs": one["roofs"]}, "proof": proof_of, "reports": {"prune_nm": one}} | more


PROVEN = proof.check("prune_nm_", "truth triton", 3, 3, [])


@pytest.mark.parametrize("failing", [None, "pytest -m gpu", "memcheck cuda"])
def test_published_visits_reach_the_readme(tmp_path, failing):
    rows = (row(PUBLISHED, 80.0), row(TORCH, 40.0), row("triton", 2.0))
    checks = [PROVEN] + ([proof.check("prune_nm_", failing, 8, 9, ["one is wrong"])] if failing else [])
    (tmp_path / "a.json").write_text(json.dumps(visit(checks, *rows)))
    folder = publish.publish([tmp_path / "a.json"], tmp_path / "results")
    assert folder.name == "2027-01-02-g"
    text = readme.section(tmp_path / "results").split("### GPU")[1]
    if failing:
        assert f"**test failed**: {failing}: one is wrong" in text and "40x" not in text
    else:
        assert "| triton | 2 ms | - | - | - | 40x | 20x |" in text


def test_whole_jobs_of_several_visits_are_published(tmp_path):
    names = ("a/2:4/wanda", "a/2:4/connect", "b/unstructured/wanda")
    for name in names:
        found = visit([PROVEN], jobs={name: job(job_run(4.0, method=name.rpartition("/")[2]))})
        (tmp_path / f"{names.index(name)}.json").write_text(json.dumps(found))
    folder = publish.publish([tmp_path / f"{index}.json" for index in range(3)], tmp_path / "results")
    first = json.loads((folder / "prune_model.json").read_text())
    assert [each["method"] for each in first["runs"]] == ["wanda", "connect"]
    assert len(json.loads((folder / "jobs" / "b-unstructured.json").read_text())["runs"]) == 1
    assert (
        "| connect | bfloat16 | wanda_fast, block | 4.00 (4.00 to 4.00) |"
        in (folder / "visit.md").read_text()
    )
    assert "| connect | bfloat16 | wanda_fast, block | 4.00" in readme.section(tmp_path / "results")


def job(*runs):
    """A report of `bench_prune_model`."""
    work = {"model": "a model", "nsamples": 1, "seqlen": 2, "sparsity_type": "2:4", "gemm_tokens": 16}
    work |= {"blocks": 2, "published_blocks": 1}
    found = {"workload": work, "machine": report()["machine"], "not_run": {}, "runs": list(runs)}
    found |= {"flops": {"published": 8e15, "block": 7.2e15, "linear": 4e15}}
    found |= {"gemm": [{"dtype": "bfloat16", "flops_per_s": 7e14}]}
    return found | {"rows": model_table.rows(found)}


def job_run(wall, pipeline="wanda_fast", agreement=1.0, **more):
    """`wall` seconds in the dense pass, the statistics and the selection."""
    phases = dict.fromkeys(model_table.PHASES, 0.0)
    phases |= {"dense pass": wall - 2.0, "statistics": 1.0, "selection": 1.0}
    masks = {"first linear": agreement} if pipeline == "wanda_fast" else None
    run = {"pipeline": pipeline, "sequential": "block", "dtype": "bfloat16", "method": "wanda"}
    return run | {"wall": wall, "seconds": phases, "masks": masks, "peak_bytes": 2**30} | more


def test_visits_of_two_commits_are_not_mixed(tmp_path):
    first, second = visit([PROVEN]), visit([PROVEN])
    second["machine"] = second["machine"] | {"commit": "def"}
    for name, data in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    with pytest.raises(publish.PublishError, match="b.json is of commit def, the first visit of abc"):
        publish.publish([tmp_path / "a.json", tmp_path / "b.json"], tmp_path)


def test_no_figure_without_truth():
    assert proof.doubt({}, "prune_nm_") == "no case against the reference was run"
    assert proof.doubt({"a": PROVEN}, "prune_nm_") == ""
    skipped = proof.check("prune_nm_", "truth cuda", 0, 0, [], "not built")
    assert proof.doubt({"a": PROVEN, "b": skipped}, "prune_nm_") == ""
    assert proof.doubt({"a": PROVEN}, "prune_rows_")


def ended(log, code=0, timed_out=False, name="x"):
    return Ended(name, code, 1.0, timed_out, log)


def test_a_case_that_never_returns_is_a_failure(tmp_path):
    lines = [("A", "started"), ("A", "passed"), ("B", "started")]
    start = {"operation": "prune_nm_", "backend": "cuda", "note": ""}
    text = [json.dumps(start | {"case": None, "verdict": "started", "planned": 7})]
    text += [json.dumps(start | {"case": case, "verdict": verdict}) for case, verdict in lines]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(text) + '\n{"operation": "cut o')
    (tmp_path / "x.log").write_text("CUDA error: an illegal memory access\n")
    (found,) = proof.of_truth(path, ended(tmp_path / "x.log", code=-9))
    assert (found["passed"], found["planned"]) == (1, 7)
    assert found["failed"] == ["B: did not return (exit code -9: CUDA error: an illegal memory access)"]
    assert proof.of_truth(path, ended(tmp_path / "x.log"))[0]["failed"] == []  # its own time was up


def verdict_of(call, benchmark=bench_prune_nm.BENCHMARK, recipe="random"):
    workload = benchmark.workloads("cpu", True)[0]
    return truth.verdict(Provider("cpu", call), workload, recipe, seed=3)


def nm(change):
    """The reference, and then a mistake."""

    def call(weight, scale, n, m, mask=None):
        reference.prune_nm_(weight, scale, n, m, mask)
        change(weight, scale, mask)

    return call


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda weight, scale, mask: weight[0, 0].add_(1), "weight: error"),
        (lambda weight, scale, mask: scale[3].mul_(2), "scale is changed"),
        (lambda weight, scale, mask: mask[1].fill_(truth.GARBAGE), "another mask"),
        (lambda weight, scale, mask: weight.copy_(torch.empty_like(weight)), "weight: error"),
        (lambda weight, scale, mask: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_truth_finds(change, sentence):
    found, why = verdict_of(nm(change))
    assert found == truth.WRONG and sentence in why
    assert verdict_of(nm(lambda *_: None)) == (truth.PASSED, "")


def test_truth_finds_a_sum_that_overwrites():
    def overwrite(acc, x):
        acc.copy_(x.float().square().sum(0))

    found, why = verdict_of(overwrite, bench_add_sq_norm.BENCHMARK)
    assert found == truth.WRONG and "acc: error 0.5" in why


@pytest.mark.parametrize("benchmark", [bench_prune_nm.BENCHMARK, bench_add_sq_norm.BENCHMARK])
def test_operands_are_what_their_recipe_says(benchmark):
    workload = benchmark.workloads("cpu", True)[0]
    index = operands.names(workload.operation).index("weight" if benchmark.operation == "prune_nm_" else "x")
    drawn = {recipe: operands.draw(workload, recipe, 5) for recipe in operands.recipes(workload)}
    assert drawn.keys() == set(operands.RECIPES)
    changed = {recipe: each[index] for recipe, each in drawn.items()}
    assert all(each.isfinite().all() for each in changed.values())
    tiny = torch.finfo(torch.bfloat16).tiny
    assert (changed["zeros"] == 0).float().mean() > 0.1
    assert changed["ties"].unique().numel() < 40
    assert ((changed["subnormals"] != 0) & (changed["subnormals"].abs() < tiny)).float().mean() > 0.1
    assert changed["huge"].abs().max() > 1e6
    assert not torch.equal(changed["random"], operands.draw(workload, "random", 6)[index])


def test_a_test_is_laid_to_the_operations_that_it_names():
    select = "tests/test_real_shapes.py::test_selection[prune_nm_-<lambda>0-shape0-triton]"
    assert pytest_outcomes.operations(select, "prune_rows_") == ["prune_nm_"]
    assert pytest_outcomes.operations("x::test_sq_norm[dtype0]", "native.add_sq_norm_(acc, x)") == [
        "add_sq_norm_"
    ]
    assert pytest_outcomes.operations("x::test_paths", "add_coactivation.add_fused_(acc)") == [
        "add_coactivation_"
    ]
    assert pytest_outcomes.operations("x::test_anything", "") == list(TABLE)
    assert pytest_outcomes.library("tests/test_native_cuda.py::test_sq_norm") == "with"
    assert pytest_outcomes.library(select) == "without"


def test_outcomes_are_written_as_they_come(tmp_path):
    source = """
import pytest
@pytest.mark.parametrize("operation", ["prune_nm_", "prune_rows_"])
def test_one(operation):
    assert operation == "prune_nm_", "it is another"
def test_skipped():
    pytest.skip("prune_matrix_ has no kernel")
def test_killed():
    import os
    os._exit(3)  # prune_variant_
"""
    (tmp_path / "test_these.py").write_text(source)
    log, lines = tmp_path / "x.log", tmp_path / "x.jsonl"
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.visit.pytest_outcomes",
        "--outcomes",
        lines,
    ]
    argv = [*map(str, argv), "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (machine.ROOT, machine.ROOT / "kernels")))}
    from benchmarks.visit import gpu_tests

    done = commands.run(Command("tests:with:0", argv, 100, log, paths))
    found = {each["operation"]: each for each in gpu_tests.checks([(lines, done)])}
    assert found["prune_nm_"]["passed"] == 1 and not found["prune_nm_"]["failed"]
    assert "it is another" in found["prune_rows_"]["failed"][0]
    assert found["prune_matrix_"]["passed"] == 0 and "no kernel" in found["prune_matrix_"]["note"]
    assert "did not return (exit code 3" in found["prune_variant_"]["failed"][0]


def test_findings_belong_to_the_operation_above_them(tmp_path):
    log = tmp_path / "x.log"
    clean = "subject prune_nm_:cuda\nsubject prune_rows_:cuda\n"
    log.write_text("========= COMPUTE-SANITIZER\n" + clean + "========= ERROR SUMMARY: 0 errors\n")
    assert [each["passed"] for each in sanitizer.judged("memcheck", ended(log))] == [1, 1]
    wrong = "========= Invalid __global__ write of size 2 bytes\n=========     at kernel+0x10\n"
    log.write_text(clean.replace("subject prune_rows_", wrong + "subject prune_rows_") + "========= killed\n")
    first, second = sanitizer.judged("memcheck", ended(log, code=-9, timed_out=True))
    assert first["failed"] == ["Invalid __global__ write of size 2 bytes"] and not first["passed"]
    assert not second["failed"] and not second["passed"] and "not finished" in second["note"]
    log.write_text("========= Error: Device not supported\n")
    assert sanitizer.judged("memcheck", ended(log, code=1)) == []


def test_commands_end_with_all_that_they_started(tmp_path):
    child = tmp_path / "child"
    argv = ["bash", "-c", f"sleep 60 & echo $! >{child}; wait"]
    slow = Command("slow", argv, 0.5, tmp_path / "slow.log")
    wrong = Command("wrong", ["bash", "-c", "echo no such kernel; exit 4"], 30, tmp_path / "wrong.log")
    began = time.monotonic()
    found = {each.name: each for each in commands.run_all([slow, wrong], at_once=2)}
    assert time.monotonic() - began < 20
    assert found["slow"].timed_out and "stopped after" in found["slow"].why()
    assert found["wrong"].why() == "exit code 4: no such kernel"
    state = Path(f"/proc/{int(child.read_text())}/stat")
    while time.monotonic() - began < 30 and _runs(state):  # a killed process ends when it is next scheduled
        time.sleep(0.05)
    assert not _runs(state)


def _runs(state: Path) -> bool:
    try:
        return state.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_entries_that_figures_would_change():
    facts = {"device": "cuda", "capability": "9.0"}
    sums = dict(operation="add_coactivation_", shape="11008x4096", setting="silu, 2048 tokens")
    rows = [
        row("cuda", 2.0),
        row("triton", 1.0),
        row("cuda", 1.0, setting="4:8"),
        row("triton", 1.01, setting="4:8"),
    ]
    rows += [row("triton", 4.0, **sums), row("triton, addmm", 4.0, **sums), row("triton, fused", 3.0, **sums)]
    rows += [row(TORCH, 0.1)]
    found = choices.choices(rows, facts)
    assert [each.change for each in found] == [
        "backends.ORDER: triton before cuda for prune_nm_",
        "",
        "coactivation_paths.PATHS: 'fused' for 11008x4096 on 9.0",
    ]


def test_goals_say_missed_where_missed():
    rows = [
        row("cuda", 1.0, roof_pct=90.0),
        row("triton", 1.0, roof_pct=10.0),  # `auto` does not take it
        row("cuda", 1.0, "prune_rows_", "4096x11008", "50%", roof_pct=59.0),
        row("cuda", 1.0, "prune_rows_", "1024x4096", "50%", roof_pct=5.0),  # too small to be meant
        replace(
            row("triton", None, "add_sq_norm_", "16384x4096", "16384 tokens"),
            status=TEST_FAILED,
            note="wrong",
        ),
    ]
    slow = dict.fromkeys(model_table.PHASES, 0.0) | {"statistics": 15.0, "selection": 5.0}
    methods = ("wanda", "sparsegpt", "connect")
    jobs = {
        f"llama2-7b/2:4/{method}": job(
            job_run(20.0, "published", seconds=slow, method=method),  # one block of two
            job_run(10.0, agreement=0.5 if method == "connect" else 0.999, method=method),
        )
        for method in methods
    }
    data = visit([PROVEN], jobs=jobs)
    found = goals.outcomes(data, rows)
    assert [each.verdict for each in found] == [
        goals.MET, TEST_FAILED, goals.MISSED, goals.NOT_MEASURED,
        goals.MET, goals.NOT_MEASURED, goals.MET, goals.NOT_MEASURED, goals.MET,
    ]  # fmt: skip
    assert found[4].came == "1.11 times" and found[6].came == "4.00 times" and found[8].came == "20.00 times"


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
