"""What a visit to a GPU finds wrong before it measures: values, tests, the sanitizer, what never returns."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench_add_sq_norm, bench_prune_nm, machine
from benchmarks.providers import Provider
from benchmarks.visit import (
    commands,
    operands,
    proof,
    pytest_outcomes,
    sanitizer,
    truth,
)
from benchmarks.visit.commands import Command, Ended
from wanda_kernels import reference
from wanda_kernels.dispatch.backends import TABLE


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
