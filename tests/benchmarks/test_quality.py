"""The quality tables: which cells they hold, how they are counted, what is not measured."""

import shutil

import pytest
import typer

from benchmarks import machine, quality, quality_pages
from benchmarks.quality_results import Cell, Cost, Results, mean_and_std


def cell(method, pattern, nsamples, seed, perplexity):
    return Cell(method, pattern, nsamples, seed, perplexity, 0.5, "abc", "AVX2")


@pytest.fixture
def results():
    found = Results("tiny", "a protocol", 10.0)
    for seed, (wanda, connect, gated) in enumerate(
        [(30.0, 31.0, 29.0), (32.0, 31.5, 31.0), (31.0, 33.0, 32.0)]
    ):
        found.cells += [cell("wanda", "2:4", 16, seed, wanda), cell("connect", "2:4", 16, seed, connect)]
        found.cells += [cell("gated", "2:4", 16, seed, gated)]
    found.cells.append(cell("magnitude", "2:4", 0, 0, 400.0))
    return found


def test_mean_and_sample_deviation():
    assert mean_and_std({0: 30.0, 1: 32.0, 2: 31.0}) == "31.00 (1.00)"
    assert mean_and_std({0: 1773.25}) == "1773.2"
    assert mean_and_std({}) == "not measured"


def test_tables_count_seeds_and_wins(results):
    methods = quality_pages.methods_table(results)
    assert "| wanda | 2:4 | 31.00 (1.00) | 3 | - | - |" in methods
    assert "| magnitude | 2:4 | 400.0 | 1 | - | - |" in methods and "0.5" not in methods
    assert "| 2:4 | 16 | 31.00 (1.00) | 31.83 (1.04) | 3 |" in quality_pages.sizes_table(results)
    assert quality_pages.gated_table(results).endswith("| 30.67 (1.53) | 3 | 2 |")


def test_results_grow_and_keep_to_one_protocol(results, tmp_path):
    results.save(tmp_path)
    again = Results.open("tiny", tmp_path)
    assert again == results and Results.every(tmp_path) == [results]
    assert again.has("wanda", "2:4", 16, 2) and not again.has("wanda", "2:4", 16, 3)
    again.require_protocol("a protocol", lambda: 1 / 0)
    with pytest.raises(SystemExit, match="another --label"):
        again.require_protocol("another protocol", lambda: 1.0)


PAGES = {
    "README.md": ("quality", "sizes"),
    "docs/quality.md": ("quality", "sizes"),
    "docs/gated.md": ("quality",),
}


def test_pages_replace_what_stands_between_the_markers(results, tmp_path):
    (tmp_path / "docs").mkdir()
    for name, sections in PAGES.items():
        marked = "before\n<!-- {0}:begin -->\nold\n<!-- {0}:end -->\nafter\n"
        (tmp_path / name).write_text("".join(map(marked.format, sections)))
    quality_pages.write([results], tmp_path)
    found = {name: (tmp_path / name).read_text() for name in PAGES}
    assert not any("old" in text for text in found.values())
    shown = {name: text.count("**tiny**, dense 10.00; a protocol.") for name, text in found.items()}
    assert shown == {"README.md": 0, "docs/quality.md": 2, "docs/gated.md": 1}  # no seconds: not the README's
    assert "| 3 | 2 |" in found["docs/gated.md"]
    results.costs, results.machine = [Cost("wanda", "2:4", 16, 1.25, 2**30)], machine.describe("cpu")
    quality_pages.write([results], tmp_path)
    assert "| wanda | 2:4 | 31.00 (1.00) | 3 | 1.2 s | 1024 MiB |" in (tmp_path / "README.md").read_text()
    (tmp_path / "docs" / "gated.md").write_text("no markers")
    with pytest.raises(typer.BadParameter, match="gated.md needs the lines"):
        quality_pages.write([results], tmp_path)


def test_the_pages_show_what_the_results_say(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in PAGES:
        shutil.copyfile(machine.ROOT / name, tmp_path / name)
    quality_pages.write(Results.every(), tmp_path)
    for name in PAGES:
        assert (tmp_path / name).read_text() == (machine.ROOT / name).read_text()


def test_options_of_a_cell():
    assert quality.options("wanda+obs", "2:4") == {
        "prune_method": "wanda",
        "update": "obs",
        "sparsity_type": "2:4",
    }
    assert quality.options("gated", "0.6")["sparsity_ratio"] == 0.6
