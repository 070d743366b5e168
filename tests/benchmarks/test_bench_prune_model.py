"""The benchmark of whole jobs: both pipelines prune the same weights, or no factor is shown."""

import copy
import json
from statistics import median

import pytest
import torch

import wanda_fast
from benchmarks.core import machine
from benchmarks.jobs import bench_prune_model, model_run, model_shapes, model_table, published_pipeline
from benchmarks.jobs.stopwatch import Stopwatch
from tests.published import prune_published

TINY = ["--shape", "tiny", "--device", "cpu", "--nsamples", "3", "--seqlen", "40", "--dtype", "float32"]


@pytest.fixture
def here(monkeypatch):
    """Jobs run in this process: the imports of a new one take seconds."""

    def run(options, settings, folder):
        common = ("model", "shape", "device", "nsamples", "seqlen", "gemm_tokens", "reference_blocks")
        settings = {name: getattr(options, name) for name in common} | settings
        return model_run.run(
            settings | {"tokens": str(folder / "tokens.pt"), "pattern": options.sparsity_type}
        )

    monkeypatch.setattr(bench_prune_model, "_run", run)


def test_both_pipelines_prune_the_same_weights(here, tmp_path, capsys):
    out = tmp_path / "job-tiny-2of4.json"
    words = ["--methods", "wanda,connect,nosuch", "--reference-blocks", "2", "--out", str(out)]
    assert bench_prune_model.main([*TINY, *words]) == 0
    report = json.loads(out.read_text())
    assert report["not_run"] == {"nosuch": "wanda_fast does not know this method"}
    assert (report["workload"]["published_blocks"], report["workload"]["blocks"]) == (2, 3)
    found = model_table.rows(report)
    rows = {(row["method"], row["pipeline"], row["sequential"]): row for row in found}
    assert len(rows) == len(found) == 6 and len(report["runs"]) == 12
    for (_, pipeline, sequential), row in rows.items():
        assert len(row["walls_s"]) == 2 and row["peak_bytes"] > 0 and 0 < row["gemm_share"]
        assert set(row["seconds"]) == {*model_run.PHASES, "other"} and row["seconds"]["statistics"] > 0
        assert (row["seconds"]["one pass"] > 0) == (sequential == "linear")
        if pipeline == "published":
            assert row["masks"] is row["over_same_dtype"] is row["agreement"] is None
            assert row["wall_s"] == pytest.approx(median_of_scaled_walls(report, row))
        else:
            published = rows[row["method"], "published", "block"]
            assert row["over_float32"] == published["wall_s"] / row["wall_s"]
            assert row["masks"].keys() == {"first linear", "block 0", "block 1"}
            assert row["masks"]["first linear"] > 0.999
            if sequential == "block":
                assert min(row["masks"].values()) > 0.995
    page = capsys.readouterr().out
    assert "2 of 3 blocks" in page and "nosuch" in page and model_table.table(report) in page
    assert model_table.newest(tmp_path, "cpu") == []
    (tmp_path / "day").mkdir()
    out.rename(tmp_path / "day" / out.name)
    assert model_table.newest(tmp_path, "cpu") == [report] and model_table.newest(tmp_path, "cuda") == []
    earlier = {**report, "machine": {**report["machine"], "date": "2020-01-01", "torch": "old"}}
    other = {**report, "machine": {**report["machine"], "date": "2020-01-02", "cpu_capability": "another"}}
    for day, each in (("earlier", earlier), ("other", other)):
        (tmp_path / day).mkdir()
        (tmp_path / day / out.name).write_text(json.dumps(each))
    assert model_table.newest(tmp_path, "cpu") == [report, other]  # the newest of each kind of machine


def median_of_scaled_walls(report, row):
    """Three blocks for two: half as long again, but for what is read, written and done once; and the dense
    pass of the method that was faster at it."""
    keys, walls = ("method", "pipeline", "sequential"), []
    published = [run for run in report["runs"] if run["pipeline"] == "published"]
    dense = {
        method: median(run["seconds"]["dense pass"] for run in published if run["method"] == method)
        for method in ("wanda", "connect")
    }
    for run in report["runs"]:
        if all(run[key] == row[key] for key in keys):
            seconds = run["seconds"]
            if dense[row["method"]] > min(dense.values()):
                seconds = seconds | {"dense pass": min(dense.values())}
            once = sum(seconds[name] for name in ("read", "block inputs", "write", "other"))
            walls.append(once + 1.5 * (sum(seconds.values()) - once))
    return median(walls)


def test_a_file_keeps_its_runs_and_refuses_others(here, tmp_path, monkeypatch):
    out, facts, describe = tmp_path / "prune_model.json", {"commit": "first"}, machine.describe
    monkeypatch.setattr(machine, "describe", lambda device: describe(device) | facts)
    words = [*TINY, "--methods", "wanda", "--sequential", "block", "--rounds", "1", "--out", str(out)]
    assert bench_prune_model.main(words) == 0
    facts["commit"] = "second"
    assert bench_prune_model.main(words) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["commit"] == "first, second"
    assert [run["commit"] for run in report["runs"]] == ["first"] * 2 + ["second"] * 2
    assert len(report["runs"]) == 4 and len(report["gemm"]) == 2
    assert [len(row["walls_s"]) for row in model_table.rows(report)] == [2, 2]
    with pytest.raises(SystemExit, match="runs of other work"):
        bench_prune_model.main([*words, "--sparsity-type", "4:8"])
    facts["cpu_capability"] = "another"
    with pytest.raises(SystemExit, match="runs of another machine.*now 'another'"):
        bench_prune_model.main(words)
    assert json.loads(out.read_text()) == report


def test_other_masks_earn_no_factor(here, monkeypatch, capsys):
    honest = wanda_fast.prune
    monkeypatch.setattr(
        wanda_fast, "prune", lambda model, **words: honest(model, **words | {"prune_method": "magnitude"})
    )
    words = ["--methods", "wanda", "--sequential", "block", "--rounds", "1"]
    assert bench_prune_model.main([*TINY, *words]) == 1
    assert "**other masks**" in capsys.readouterr().out


def test_a_job_in_a_process_of_its_own(tmp_path):
    options = bench_prune_model._parse([*TINY, "--methods", "wanda"])
    rate = bench_prune_model._run(options, {"pipeline": "gemm", "dtype": "float32"}, tmp_path)
    assert rate["flops_per_s"] > 0


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "connect", "sparsegpt"])
def test_the_timed_run_prunes_as_the_untimed(method, pattern):
    """topk instead of a stable sort, and block 0's arguments for all blocks, change nothing here."""
    model = model_shapes.random_model("tiny", torch.float32, "cpu")
    ids = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(model)
    masks = prune_published(expected, ids, method, pattern)
    watch = Stopwatch(torch.device("cpu"))
    kept = published_pipeline.prune_published(model, ids, method, pattern, stopwatch=watch)
    assert len(masks) == 21 and kept == {}
    zeros = [torch.cat([(p == 0).flatten() for p in each.model.parameters()]) for each in (model, expected)]
    assert zeros[0].any() and (zeros[0] == zeros[1]).float().mean() > 0.9999
    assert ("statistics" in watch.seconds) == (method != "magnitude")


def test_published_sparsegpt_loses_less_than_wanda():
    """Of the first block's output, on its own calibration: what the update is for."""
    lost = {}
    ids = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(1))
    for method in ("wanda", "sparsegpt"):
        model = model_shapes.random_model("tiny", torch.float32, "cpu")
        with torch.no_grad():
            dense = model(ids, output_hidden_states=True).hidden_states[1]
            prune_published(model, ids, method, "2:4", n_blocks=1)
            lost[method] = (model(ids, output_hidden_states=True).hidden_states[1] - dense).norm().item()
        weight = model.model.layers[0].mlp.up_proj.weight
        assert (weight.view(-1, 4) == 0).sum(1).eq(2).all()
    assert lost["sparsegpt"] < 0.95 * lost["wanda"]


def test_flops_of_the_passes():
    work = model_shapes.Work([(8, 4), (4, 8)], heads=2, head_dim=2, n_blocks=3, nsamples=5, seqlen=7)
    block = 2 * 35 * 64 + 4 * 35 * 8 // 2 * 4
    assert work.flops("published") == 6 * block
    assert work.flops("wanda_fast") == 3 * (block - 2 * 35 * 32) + 2 * block
    assert work.flops("wanda_fast", "linear") == 3 * block
