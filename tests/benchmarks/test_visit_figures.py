"""What a visit to a GPU publishes, what its figures would change, and which goals they meet."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import model_table, speed_page
from benchmarks.providers import PUBLISHED, TORCH
from benchmarks.roofs import Roofs
from benchmarks.rows import OK, TEST_FAILED, Row
from benchmarks.visit import (
    choices,
    goals,
    proof,
    publish,
)
from benchmarks.visit.rates import SUSTAINED

ROOFS = Roofs(bytes_per_s=4e12, flops_per_s=8e14, copy="a copy", matmul="a matmul")


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
def test_published_visits_reach_the_page(tmp_path, failing):
    rows = (row(PUBLISHED, 80.0), row(TORCH, 40.0), row("triton", 2.0))
    checks = [PROVEN] + ([proof.check("prune_nm_", failing, 8, 9, ["one is wrong"])] if failing else [])
    (tmp_path / "a.json").write_text(json.dumps(visit(checks, *rows)))
    folder = publish.publish([tmp_path / "a.json"], tmp_path / "results")
    assert folder.name == "2027-01-02-g"
    text = speed_page.section(tmp_path / "results").split("### GPU")[1]
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
    assert "| connect | bfloat16 | wanda_fast, block | 4.00 |" in (folder / "visit.md").read_text()
    assert "| connect | bfloat16 | wanda_fast, block | 4.00" in speed_page.section(tmp_path / "results")


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
    run = {
        "pipeline": pipeline,
        "sequential": "block",
        "dtype": "bfloat16",
        "method": "wanda",
        "commit": "abc",
    }
    return run | {"wall": wall, "seconds": phases, "masks": masks, "peak_bytes": 2**30} | more


@pytest.mark.parametrize("checks", [[PROVEN], []], ids=["proven", "unproven"])
def test_no_other_commits_tests_vouch_for_a_figure(checks, tmp_path):
    rows = (row(PUBLISHED, 80.0), row("triton", 2.0))
    first, second = visit([PROVEN], *rows), visit(checks, *rows)
    for part in (second, second["reports"]["prune_nm"]):
        part["machine"] = part["machine"] | {"commit": "def"}
    for name, data in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    folder = publish.publish([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "results")
    text = speed_page.section(tmp_path / "results").split("### GPU")[1]
    assert ("40x" in text) == bool(checks) and "commit def;" in text
    assert "commit abc, def;" in (folder / "visit.md").read_text()


def test_visits_of_two_machines_are_not_mixed(tmp_path):
    first, second = visit([PROVEN]), visit([PROVEN])
    second["machine"] = second["machine"] | {"gpu": "H"}
    for name, data in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    with pytest.raises(publish.PublishError, match="b.json is of gpu H, the first visit of G"):
        publish.publish([tmp_path / "a.json", tmp_path / "b.json"], tmp_path)


def test_no_figure_without_truth():
    assert proof.doubt({}, "prune_nm_") == "no case against the reference was run"
    assert proof.doubt({"a": PROVEN}, "prune_nm_") == ""
    skipped = proof.check("prune_nm_", "truth cuda", 0, 0, [], "not built")
    assert proof.doubt({"a": PROVEN, "b": skipped}, "prune_nm_") == ""
    assert proof.doubt({"a": PROVEN}, "prune_rows_")


def test_the_entries_that_figures_would_change():
    facts = {"device": "cuda", "capability": "9.0"}
    sums = dict(operation="add_coactivation_", shape="11008x4096", setting="silu, 2048 tokens")
    rows = [
        row("triton", 2.0),
        row("cuda", 1.0),
        row("triton", 1.01, setting="4:8"),
        row("cuda", 1.0, setting="4:8"),
    ]
    rows += [row("triton", 4.0, **sums), row("triton, addmm", 4.0, **sums), row("triton, fused", 3.0, **sums)]
    rows += [row(TORCH, 0.1)]
    found = choices.choices(rows, facts)
    assert [each.change for each in found] == [
        "backends.order: cuda before triton for prune_nm_",
        "",
        "coactivation_paths.PATHS: 'fused' for 11008x4096 on 9.0",
    ]


def test_goals_say_missed_where_missed():
    rows = [
        row("triton", 1.0, roof_pct=90.0),
        row("cuda", 1.0, roof_pct=10.0),  # `auto` does not take it
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
    data["rates"]["rates"] = [{"name": SUSTAINED, "value": 400.0}]  # half the roof
    found = goals.outcomes(data, rows)
    assert [each.verdict for each in found] == [
        goals.MET, TEST_FAILED, goals.MISSED, goals.NOT_MEASURED,
        goals.MET, goals.NOT_MEASURED, goals.MET, goals.NOT_MEASURED, goals.MET,
    ]  # fmt: skip
    assert (
        found[4].came == "1.11 times (0.56 at the rate that 4 s of matmuls keep)"
        and found[6].came == "4.00 times"
        and found[8].came == "20.00 times"
    )


def test_a_first_use_is_not_multiplied():
    """Of three methods on one of two blocks, the dense pass of the fastest; on all blocks, each its own."""
    phases = dict.fromkeys(model_table.PHASES, 0.0) | {"selection": 1.0}
    runs = [
        job_run(0.0, "published", method=method, seconds=phases | {"dense pass": dense})
        for method, dense in (("wanda", 5.0), ("connect", 2.0), ("sparsegpt", 3.0))
    ]
    report = job(*runs)
    assert [row["wall_s"] for row in model_table.rows(report)] == [6.0, 6.0, 6.0]
    report["workload"]["published_blocks"] = 2
    assert [row["wall_s"] for row in model_table.rows(report)] == [6.0, 3.0, 4.0]
