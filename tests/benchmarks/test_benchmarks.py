"""The benchmarks' honesty: wrong results get no figures, calls fresh operands, tables say what files say."""

from dataclasses import fields, replace

import pytest
import torch

from benchmarks import __main__ as suite_command
from benchmarks.core import machine, results, rows, shapes, suite, timing
from benchmarks.core.providers import PUBLISHED, TORCH, Provider
from benchmarks.core.roofs import Roofs
from benchmarks.core.rows import FAILED, Row
from benchmarks.ops import bench_dispatch, bench_prune_rows

ROOFS = Roofs(bytes_per_s=1e10, flops_per_s=1e12, copy="a copy", matmul="a matmul")
UNPUBLISHED = {"refine_mask"}  # no code of its authors
SESSION = suite.Session("cpu", quick=True, budget_s=0.0, roofs=ROOFS)


def invoke(*arguments):
    return suite_command.main(list(map(str, arguments)))


def row(provider, time_ms, status="ok", setting="50%", operation="prune_rows_"):
    return Row(operation, "a linear", "4x8", "bfloat16", setting, provider, True, status, time_ms=time_ms)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "quick"
    assert invoke("--quick", "--out", folder) == 0
    return results.read(folder)


@pytest.mark.parametrize("name", [name for name in suite_command.BENCHMARKS if name != "dispatch"])
def test_quick_writes_complete_rows(quick, name):
    operation = suite_command.BENCHMARKS[name].operation
    assert quick.quick and quick.matmul
    assert "triton" in quick.not_run[operation]  # no GPU's figure from the interpreter
    found = [row for row in quick.rows if row.operation == operation]
    published = name not in UNPUBLISHED
    assert {TORCH} | ({PUBLISHED} if published else set()) <= {row.provider for row in found}
    for row in found:
        assert row.status == "ok", row
        missing = [each.name for each in fields(Row) if getattr(row, each.name) is None]
        assert missing == ([] if published else ["over_published"]), row
        assert row.fastest_ms <= row.time_ms and row.commit and row.copy_gb_s > 0


def test_a_stack_of_experts_is_pruned_at_once_and_in_a_loop(quick):
    found = [row for row in quick.rows if row.shape == "3x16x64"]
    ours = [row.provider for row in found if row.provider not in (PUBLISHED, TORCH)]
    assert {row.setting for row in found} == {"2:4", "50%"}
    assert {f"{name}, by expert" for name in ours if "by expert" not in name} <= set(ours)


def test_quick_dispatch_has_every_operation(quick):
    found = [row for row in quick.rows if row.operation == "dispatch"]
    assert {row.setting for row in found} == bench_dispatch.PARAMS.keys()
    assert all(row.time_ms > 0 and row.gb_s is None for row in found)


def test_a_run_shows_progress_and_ends_with_one_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (10_000.0, 0.0, 0.0))
    assert invoke("--quick", "--only", "prune_rows", "--out", tmp_path / "own") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Warning: the load average is 10000.0") and lines[-2] == lines[0]
    workloads = len(bench_prune_rows.BENCHMARK.workloads("cpu", True))
    progress = [line for line in lines if line.startswith("[")]
    assert len(progress) == workloads and progress[-1].startswith(f"[{workloads}/{workloads}, ")
    (header,) = (index for index, line in enumerate(lines) if line.startswith("operation"))
    names = (
        "operation",
        "shape",
        "dtype",
        "setting",
        "backend",
        "time",
        "of roof",
        "over published",
        "over torch",
    )
    assert all(name in lines[header] for name in names)
    cells = lines[header + 2].split()
    assert cells[0] == "prune_rows_" and cells[-1].endswith("x") and cells[-2].endswith("x")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]  # and nothing else is written


def test_only_and_unknown_names(tmp_path, capsys):
    assert invoke("--quick", "--only", "prune_rows", "--out", tmp_path) == 0
    assert {row.operation for row in results.read(tmp_path).rows} == {"prune_rows_"}
    with pytest.raises(SystemExit) as stopped:
        invoke("--only", "prune_cols", "--out", tmp_path)
    assert stopped.value.code == 2 and "prune_cols" in capsys.readouterr().err


def test_a_folder_keeps_other_operations_and_refuses_other_machines(tmp_path):
    facts = machine.describe("cpu")
    for operation, time_ms in (("prune_nm_", 1.0), ("prune_rows_", 2.0), ("prune_nm_", 3.0)):
        found = [row("cpu", time_ms, operation=operation), row(TORCH, None, FAILED, operation=operation)]
        results.write(tmp_path, found, facts, ROOFS, False, {"triton": "needs a GPU"})
    run = results.read(tmp_path)
    assert [each.time_ms for each in run.rows] == [2.0, None, 3.0, None]
    assert run.rows[0].copy_gb_s == 10 and run.rows[0].date == facts["date"] and run.rows[0].headline is True
    assert run.machine == facts and not run.quick and run.not_run.keys() == {"prune_nm_", "prune_rows_"}
    with pytest.raises(ValueError, match="another machine: torch .*, now 'old'"):
        results.write(tmp_path, found, facts | {"torch": "old"}, ROOFS, False, {})


def spoilt(call):
    """One weight too many is pruned in the last row."""

    def wrong(weight, *rest):
        call(weight, *rest)
        weight[-1, weight[-1].abs().argmax()] = 0

    return wrong


def raising(*_):
    raise RuntimeError("no such kernel\nsecond line")


@pytest.mark.parametrize("call", [spoilt(bench_prune_rows.published), raising])
def test_a_wrong_provider_gets_no_time_and_no_speed_up(monkeypatch, tmp_path, capsys, call):
    peers = [*bench_prune_rows.BENCHMARK.peers, Provider("rival", call)]
    wrong = replace(bench_prune_rows.BENCHMARK, peers=peers)
    monkeypatch.setitem(suite_command.BENCHMARKS, "prune_rows", wrong)
    assert invoke("--quick", "--only", "prune_rows", "--out", tmp_path) == 1
    assert f"**{FAILED}**" in capsys.readouterr().out.splitlines()[-6]  # in the last table
    found = results.read(tmp_path).rows
    failed = [row for row in found if row.provider == "rival"]
    assert failed and all(row.status == FAILED and row.note for row in failed)
    assert all(row.time_ms is row.over_published is row.over_torch is None for row in failed)
    assert all(row.over_published for row in found if row.provider == TORCH)


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


def test_no_factor_is_given_over_a_published_code_that_failed():
    found = rows.with_speed_ups([row(PUBLISHED, None, FAILED), row(TORCH, 4.0), row("cpu", 2.0)])
    assert [one.over_published for one in found] == [None] * 3
    assert found[2].over_torch == 2.0


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


def test_the_shapes_of_real_models_have_workloads():
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
        ("prune_nm_", "128x768x2048", "2:4"),
        ("prune_rows_", "128x768x2048", "50%"),
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
