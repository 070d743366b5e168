"""The generated pages: equal to the results that are committed; gaps and failures are shown."""

import shutil
from dataclasses import replace

import pytest

from benchmarks import charts, pages
from benchmarks.core import machine, results
from benchmarks.core.catalogue import BENCHMARKS
from benchmarks.core.providers import PUBLISHED, TORCH
from benchmarks.core.roofs import Roofs
from benchmarks.core.rows import FAILED, OK, Row
from benchmarks.quality.results import Results

OPERATIONS = len(BENCHMARKS) - 1  # the cost of a call is no operation
ROOFS = Roofs(bytes_per_s=1e10, flops_per_s=1e12, copy="a copy", matmul="a matmul")
FACTS = {"device": "cpu", "cpu": "C(R) Processor", "cores": 2, "cpu_capability": "AVX2", "load_before": 0.0}
FACTS |= dict.fromkeys(("threads", "openmp", "torch", "triton", "python", "commit"), "?")
GENERATED = ("speed.md", "quality.md")


def row(provider, time_ms, setting="50%", **more):
    return Row(
        "prune_rows_", "a linear", "4x8", "bfloat16", setting, provider, True, OK, time_ms=time_ms, **more
    )


def measured(folder, day, *rows, quick=False, **facts):
    facts = FACTS | {"date": f"{day} 00:00 UTC"} | facts
    results.write(folder / f"{day}-x", list(rows), facts, ROOFS, quick, {})


def test_the_committed_pages_show_what_the_results_say(tmp_path):
    docs = machine.ROOT / "docs"
    (tmp_path / "docs").mkdir()
    for name in GENERATED:
        shutil.copyfile(docs / name, tmp_path / "docs" / name)
    pages.write(tmp_path, machine.RESULTS)
    for name in GENERATED:
        assert (tmp_path / "docs" / name).read_text() == (docs / name).read_text(), (
            f"{name}: run `make pages`"
        )


def test_the_committed_pictures_show_what_the_results_say():
    """A picture holds its data, as text."""
    images, every = machine.ROOT / "docs" / "images", Results.every(machine.RESULTS / "quality")
    shown = [charts.data_of(images / f"{name}.svg") for name in ("speed", "quality", "frontier")]
    data = [charts.speed_data(machine.RESULTS), charts.quality_data(every), charts.frontier_data(every)]
    assert shown == data, "run `make pages`"


def test_the_newest_figures_of_each_operation_and_what_was_not_measured(tmp_path):
    measured(tmp_path, "2026-01-01", row("cpu", 77.0))
    measured(tmp_path, "2026-01-02", row(PUBLISHED, 8.0), row("cpu", 2.0, over_published=4.0))
    page = pages.speed(tmp_path)
    gpu, cpu = page.split("### GPU")[1].split("### CPU")
    assert "| cpu | 2 ms | - | - | - | 4.00x | - |" in cpu and "77" not in cpu
    assert "`2026-01-02-x`" in cpu and "2026-01-01" not in cpu
    missing = "Not measured: " + ", ".join(each.operation for each in BENCHMARKS.values())
    assert (
        missing.removesuffix(", dispatch") in gpu
        and "prune_rows_" not in cpu.split("Not measured:")[1].split("\n")[0]
    )
    assert "On a GPU: not measured." in page and "On a CPU: not measured." in page


def test_a_failure_is_shown_without_a_figure(tmp_path):
    wrong = replace(row("cpu", None), status=FAILED, note="error 2, allowed 1")
    measured(tmp_path, "2026-01-01", wrong, row(TORCH, 1.0))
    assert "| cpu | **FAILED**: error 2, allowed 1 | - | - | - | - | - |" in pages.speed(tmp_path)


@pytest.mark.parametrize("how", [dict(quick=True), dict(rehearsal=True)])
def test_a_rehearsal_is_never_shown(tmp_path, how):
    measured(tmp_path, "2026-01-01", row("cpu", 77.0), **how)
    with pytest.raises(ValueError, match="is no measurement"):
        pages.speed(tmp_path)
