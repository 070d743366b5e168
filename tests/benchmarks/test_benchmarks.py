"""The benchmarks' honesty: wrong results get no figures, calls fresh operands, pages say what files say."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as suite_command
from benchmarks import (
    bench_dispatch,
    bench_prune_rows,
    block_forward,
    rows,
    shapes,
    suite,
    tables,
    timing,
)
from benchmarks.providers import PUBLISHED, TORCH, Provider
from benchmarks.roofs import Roofs
from benchmarks.rows import FAILED, Row

ROOFS = Roofs(bytes_per_s=1e10, flops_per_s=1e12, copy="a copy", matmul="a matmul")
SESSION = suite.Session("cpu", quick=True, compiled=False, budget_s=0.0, roofs=ROOFS)


def invoke(*arguments):
    return CliRunner().invoke(suite_command.app, list(map(str, arguments)))


def row(provider, time_ms, status="ok", setting="50%", operation="prune_rows_"):
    return Row(operation, "a linear", "4x8", "bfloat16", setting, provider, True, status, time_ms=time_ms)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "quick"
    result = invoke("--quick", "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("name", [name for name in suite_command.BENCHMARKS if name != "dispatch"])
def test_quick_writes_complete_rows(quick, name):
    report = json.loads((quick / f"{name}.json").read_text())
    assert report["quick"] and report["machine"]["commit"] and report["roofs"]["bytes_per_s"] > 0
    assert {PUBLISHED, TORCH} <= {found["provider"] for found in report["rows"]}
    assert {"triton", "torch.compile"} <= report["not_run"].keys()  # no GPU's figure from the interpreter
    for found in report["rows"]:
        assert found["status"] == "ok", found
        missing = [key for key, value in found.items() if value is None]
        assert missing == [], found
        assert found["fastest_ms"] <= found["time_ms"]
    with (quick / f"{name}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(report["rows"])
    page = (quick / f"{name}.md").read_text()
    assert page.count("\n| ") == len(report["rows"]) + 2 and "say nothing about speed" in page


def test_quick_dispatch_has_every_operation(quick):
    report = tables.read(quick / "dispatch.json")
    assert {found.setting for found in report["rows"]} == bench_dispatch.PARAMS.keys()
    assert all(found.time_ms > 0 and found.gb_s is None for found in report["rows"])


def test_only_and_unknown_names(tmp_path):
    assert invoke("--quick", "--only", "bench_prune_rows", "--out", tmp_path).exit_code == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == {"prune_rows"}
    result = invoke("--only", "prune_cols", "--out", tmp_path)
    assert result.exit_code == 2 and "prune_cols" in result.output


def spoilt(call):
    """One weight too many is pruned in the last row."""

    def wrong(weight, *rest):
        call(weight, *rest)
        weight[-1, weight[-1].abs().argmax()] = 0

    return wrong


def raising(*_):
    raise RuntimeError("no such kernel\nsecond line")


@pytest.mark.parametrize("call", [spoilt(bench_prune_rows.published), raising])
def test_a_wrong_provider_gets_no_time_and_no_speed_up(monkeypatch, tmp_path, call):
    peers = [*bench_prune_rows.BENCHMARK.peers, Provider("rival", call)]
    wrong = replace(bench_prune_rows.BENCHMARK, peers=peers)
    monkeypatch.setitem(suite_command.BENCHMARKS, "prune_rows", wrong)
    result = invoke("--quick", "--only", "prune_rows", "--out", tmp_path)
    assert result.exit_code == 1 and FAILED in result.output
    report = tables.read(tmp_path / "prune_rows.json")
    failed = [found for found in report["rows"] if found.provider == "rival"]
    assert failed and all(found.status == FAILED and found.note for found in failed)
    assert all(found.time_ms is found.over_published is found.over_torch is None for found in failed)
    assert all(found.over_published for found in report["rows"] if found.provider == TORCH)
    assert "**FAILED**" in (tmp_path / "prune_rows.md").read_text()


def test_a_failure_on_one_workload_takes_the_speed_ups_of_all():
    found = rows.with_speed_ups(
        [
            row(PUBLISHED, 8.0),
            row(TORCH, 4.0),
            row("cpu", 2.0),
            row("triton", 1.0),
            row("triton", None, FAILED, setting="70%"),
            row("triton", 1.0, operation="prune_nm_"),
            row(TORCH, 5.0, operation="prune_nm_"),
        ]
    )
    assert [one.over_published for one in found] == [1.0, 2.0, 4.0, None, None, None, None]
    assert [one.over_torch for one in found] == [0.5, 1.0, 2.0, None, None, 5.0, 1.0]


def test_nobody_is_compared_with_a_published_code_that_failed():
    found = rows.with_speed_ups([row(PUBLISHED, None, FAILED), row(TORCH, 4.0), row("cpu", 2.0)])
    assert [one.over_published for one in found] == [None] * 3
    assert found[2].over_torch == 2.0


def test_an_optional_provider_that_cannot_run_is_left_out():
    line = bench_prune_rows.BENCHMARK.lineup(SESSION)
    line.not_run.clear()
    line.providers.append(Provider("torch.compile", raising, optional=True))
    workload = bench_prune_rows.BENCHMARK.workloads("cpu", True)[0]
    found = suite.run_workload(workload, line, SESSION)
    assert "torch.compile" not in {one.provider for one in found}
    assert line.not_run["torch.compile"] == "raises RuntimeError: no such kernel"


def test_each_call_gets_fresh_weights_and_variants_alternate():
    weight = torch.arange(1.0, 9.0).view(2, 4)
    ring = timing.Ring((weight, None), cache_bytes=3 * weight.nbytes)
    order, used = [], []

    def variant(name):
        def call(operand, scale):
            assert torch.equal(operand, weight) and scale is None
            operand.zero_()  # as pruning does
            order.append(name)
            used.append(operand.data_ptr())

        return call

    def stopwatch(call):
        call()
        return 0.1 * len(order)

    found = timing.measure({name: variant(name) for name in "abc"}, ring, stopwatch, budget_s=1.0)
    rounds = ["".join(order[first : first + 3]) for first in range(0, len(order), 3)]
    assert rounds[:4] == ["abc", "abc", "bca", "cab"]  # the first is the warm-up
    assert len(ring.slots) == 7 and len(set(used)) == 7
    assert all(used[i] != used[i + 1] for i in range(len(used) - 1))
    assert {timed.rounds for timed in found.values()} == {len(rounds) - 1}


def test_slow_variants_leave_and_fast_ones_stay():
    seconds = {"glacial": 10.0, "slow": 0.4, "fast": 0.01}
    calls = {name: lambda *_, name=name: current.append(name) for name in seconds}
    current = []

    def stopwatch(call):
        call()
        return seconds[current[-1]]

    found = timing.measure(calls, timing.Ring((torch.zeros(1),), 0), stopwatch, budget_s=1.0)
    assert found["glacial"].rounds == 1
    assert found["slow"].rounds == timing.LEAST_ROUNDS
    assert 90 < found["fast"].rounds < 110
    assert found["slow"].seconds == 0.4 and found["slow"].spread == 0


def test_median_and_spread():
    times = iter([9.0, 1.0, 2.0, 3.0, 4.0, 100.0])  # the first is the warm-up
    calls = {"only": lambda *_: None}
    ring = timing.Ring((torch.zeros(1),), 0)
    found = timing.measure(calls, ring, lambda call: next(times), budget_s=50.0)["only"]
    assert (found.seconds, found.fastest, found.rounds) == (3.0, 1.0, 5)
    assert found.spread == pytest.approx((4 - 2) / 3)


def test_targets_of_the_issues_have_workloads():
    found = {
        (work.operation, work.shape, work.setting)
        for benchmark in suite_command.BENCHMARKS.values()
        if benchmark is not bench_dispatch.BENCHMARK
        for work in benchmark.workloads("cpu", False)
        if work.dtype == torch.bfloat16
    }
    assert found >= {
        ("prune_rows_", "1024x4096", "50%"),
        ("prune_nm_", "1024x4096", "2:4"),
        ("prune_nm_", "1024x4096", "16:32"),
        ("add_sq_norm_", "2048x4096", "2048 tokens"),
        ("sparsegpt_", "576x1536", "2:4"),
    }
    of_gpu = {work.shape for work in suite_command.BENCHMARKS["sparsegpt"].workloads("cuda", False)}
    assert {"4096x4096", "4096x11008", "4096x14336"} <= of_gpu
    assert {(4096, 4096), (11008, 4096), (8192, 28672), (512, 2048)} <= set(shapes.weights("cuda", False))


def test_a_reference_that_raises_fails_its_workload_and_no_other(monkeypatch):
    calls = iter([raising])
    monkeypatch.setattr(suite, "ours", lambda *args: next(calls, lambda *_: None))
    found = list(bench_prune_rows.BENCHMARK.run(SESSION, suite.Lineup([], {})))
    assert [one.status for one in found[0]] == [FAILED] and "no such kernel" in found[0][0].note
    assert len(found) > 1 and not any(found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_of_a_blocks_forward_are_compared_on_equal_results(dtype):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    with torch.no_grad():
        for case in block_forward.cases(512, dtype):
            wanted = case.torchs()
            if case.taken:
                scale = wanted.abs().max().item()
                torch.testing.assert_close(case.ours(), wanted, rtol=tolerance, atol=tolerance * scale)
