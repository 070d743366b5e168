"""README.md's summary and docs/speed.md: what the results say, losses and gaps too."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from benchmarks import model_table, readme, speed_page, tables
from benchmarks.catalogue import BENCHMARKS
from benchmarks.providers import PUBLISHED, TORCH
from benchmarks.roofs import Roofs
from benchmarks.rows import FAILED, OK, Row

OPERATIONS = len(BENCHMARKS) - 1  # the cost of a call is no operation
ROOFS = Roofs(bytes_per_s=1e10, flops_per_s=1e12, copy="a copy", matmul="a matmul")
FACTS = {"device": "cpu", "cpu": "C(R) Processor", "cores": 2, "cpu_capability": "AVX2", "load_before": 0.0}
FACTS |= dict.fromkeys(("threads", "openmp", "torch", "triton", "python", "commit"), "?")


def row(provider, time_ms, setting="50%", **more):
    return Row(
        "prune_rows_", "a linear", "4x8", "bfloat16", setting, provider, True, OK, time_ms=time_ms, **more
    )


def measured(folder, day, *rows, quick=False):
    facts = FACTS | {"date": f"{day} 00:00 UTC"}
    tables.write(folder / f"{day}-x", "prune_rows_", list(rows), facts, ROOFS, quick, {})


@pytest.fixture
def pages(tmp_path):
    found = tmp_path / "README.md", tmp_path / "speed.md"
    for page in found:
        page.write_text("before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n")
    return found


def write(pages, results):
    arguments = ["--readme", pages[0], "--speed", pages[1], "--results", results]
    return CliRunner().invoke(readme.app, list(map(str, arguments)))


def test_pages_are_idempotent_and_say_what_was_not_measured(pages, tmp_path):
    results = tmp_path / "results"
    measured(results, "2026-01-01", row("cpu", 77.0))
    measured(results, "2026-01-02", row(PUBLISHED, 8.0), row("cpu", 2.0, over_published=4.0))
    assert write(pages, results).exit_code == 0
    texts = [page.read_text() for page in pages]
    assert write(pages, results).exit_code == 0
    assert [page.read_text() for page in pages] == texts
    for text in texts:
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    cpu, gpu = texts[1].split("### GPU")
    assert "| cpu | 2 ms | - | - | - | 4.00x | - |" in cpu and "77" not in cpu
    assert gpu.count("not measured") == OPERATIONS + 1 and cpu.count("not measured") == OPERATIONS
    assert "| prune_rows_ | 4.00x | - | - | not measured | - | - |" in texts[0]
    assert texts[0].count("not measured") == 2 * OPERATIONS  # a device that has figures, a job that has none


def test_the_summary_is_of_the_fastest_backend_from_the_least_gain_to_the_most(tmp_path):
    fast = [
        row("cpu", 2.0, setting, over_published=by, over_torch=0.5)
        for setting, by in (("a", 9.0), ("b", 3.0))
    ]
    slow = row("triton", 5.0, "b", over_published=1.1, over_torch=0.2)
    other = replace(row("cpu", 1.0, "c", over_published=99.0), headline=False)
    measured(tmp_path, "2026-01-01", *fast, slow, other, row(TORCH, 1.0))
    assert "| prune_rows_ | 3.00x to 9.00x | 0.50x | - |" in readme.summary(tmp_path)
    wrong = replace(slow, status=FAILED, note="error 2, allowed 1", time_ms=None)
    measured(tmp_path, "2026-01-01", *fast, wrong)
    text = readme.summary(tmp_path)
    assert "| prune_rows_ | **FAILED**: triton, error 2, allowed 1 | - | - |" in text and "3.00x" not in text


def test_a_whole_job_is_a_line_of_the_summary(tmp_path):
    def job(pipeline, wall, over=None, agreement=None, sequential="block"):
        found = {"method": "wanda", "dtype": "float32", "pipeline": pipeline, "sequential": sequential}
        return found | {"wall_s": wall, "over_same_dtype": over, "agreement": agreement}

    work = {"model": "m", "nsamples": 4, "seqlen": 8, "sparsity_type": "2:4"}
    jobs = [
        job("wanda_fast", 3.0, 3.0, True),
        job("published", 9.0),
        job("wanda_fast", 2.0, 4.5, False, "linear"),
    ]
    report = {"workload": work, "machine": FACTS | {"date": "2026-01-02"}, "rows": jobs}
    for day, rows in (("2026-01-01", jobs[1:2]), ("2026-01-02", jobs)):
        (tmp_path / day).mkdir()
        found = report | {"machine": FACTS | {"date": day}, "rows": rows}
        (tmp_path / day / "prune_model.json").write_text(json.dumps(found))
    lines = model_table.summary(tmp_path).splitlines()
    assert lines[0] == "**m**, 4 x 8 tokens, 2:4:"
    machine = "C Processor, 2 cores, AVX2"
    assert lines[4:] == [f"| {machine} | wanda | float32 | 9.0 s | 3.0 s, 3.00x | 2.0 s, **other masks** |"]


def test_smoke_tests_do_not_count_and_a_page_needs_its_comments(pages, tmp_path):
    measured(tmp_path / "results", "2026-01-01", row("cpu", 77.0), quick=True)
    assert write(pages, tmp_path / "results").exit_code == 0
    assert pages[1].read_text().count("not measured") == 2 * (OPERATIONS + 1)
    pages[0].write_text("no comments here\n")
    assert write(pages, tmp_path / "results").exit_code == 2
    assert pages[0].read_text() == "no comments here\n"


@pytest.mark.parametrize("name, text", [("README.md", readme.summary), ("docs/speed.md", speed_page.section)])
def test_the_pages_show_what_the_results_say(name, text):
    page = (readme.ROOT / name).read_text(encoding="utf-8")
    between = page.split("<!-- benchmarks:begin -->")[1].split("<!-- benchmarks:end -->")[0]
    assert between.strip() == text(readme.RESULTS).strip()
