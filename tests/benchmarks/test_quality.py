"""The quality tables: which cells they hold, how they are counted, what is not measured."""

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from benchmarks import charts, pages
from benchmarks.quality import __main__ as quality
from benchmarks.quality import small_llama, small_moe
from benchmarks.quality.results import Cell, Cost, Results, mean_and_std


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
    methods = pages.methods_table(results)
    assert "| wanda | 2:4 | 31.00 (1.00) | 3 | - | - |" in methods
    assert "| magnitude | 2:4 | 400.0 | 1 | - | - |" in methods and "0.5" not in methods
    windows = pages.windows_table(results)
    assert windows.endswith("| 2:4 | 16 | 31.00 (1.00) | 31.83 (1.04) | 30.67 (1.53) | 3 | 2 |")
    page = pages.quality([results])
    assert page.count("**tiny**, dense 10.00; a protocol.") == 2 and methods in page and windows in page
    results.costs = [Cost("wanda", "2:4", 16, 1.25, 2**30)]
    assert "| wanda | 2:4 | 31.00 (1.00) | 3 | 1.2 s | 1024 MiB |" in pages.methods_table(results)


def test_the_chart_has_a_line_for_each_method():
    found = Results(charts.DENSE_MODEL, "a protocol", 10.0)
    for method in charts.LINES:
        for ratio, perplexity in (
            ("0.3", 11.0),
            ("0.5", 20.0),
            ("0.7", 9999.0 if method == "magnitude" else 90.0),
        ):
            found.cells.append(cell(method, ratio, 0 if method == "magnitude" else 16, 0, perplexity))
    data = charts.quality_data([found])
    assert data["dense"] == 10.0 and list(data["lines"]) == list(charts.LINES)
    assert data["lines"]["sparsegpt"] == [[0.3, 11.0], [0.5, 20.0], [0.7, 90.0]]
    assert data["lines"]["magnitude"][-1] == [0.7, 9999.0]


def test_the_frontier_has_a_point_for_each_method_with_seconds_and_perplexity():
    facts = {"device": "cpu", "cpu": "a processor", "cores": 2, "cpu_capability": "AVX2"}
    found = Results(charts.FRONTIER_MODEL, "a protocol", 10.0, machine=facts)
    found.cells = [cell("admm", "2:4", 16, seed, 20.0 + seed) for seed in range(3)]
    found.cells += [cell("wanda", "2:4", 16, 0, 50.0), cell("gated", "2:4", 16, 0, 40.0)]
    found.costs = [Cost("admm", "2:4", 16, 12.34, 1), Cost("wanda", "2:4", 16, 3.0, 1)]
    found.costs += [Cost("wanda", "0.5", 16, 9.0, 1)]
    assert charts.frontier_data([found])["points"] == {"admm": [12.3, 21.0], "wanda": [3.0, 50.0]}


def test_results_grow_and_keep_to_one_protocol(results, tmp_path):
    results.save(tmp_path)
    again = Results.open("tiny", tmp_path)
    assert again == results and Results.every(tmp_path) == [results]
    assert again.has("wanda", "2:4", 16, 2) and not again.has("wanda", "2:4", 16, 3)
    again.require_protocol("a protocol", lambda: 1 / 0)
    with pytest.raises(SystemExit, match="another --label"):
        again.require_protocol("another protocol", lambda: 1.0)


def test_options_of_a_cell():
    assert quality.options("wanda+obs", "2:4") == {
        "prune_method": "wanda",
        "update": "obs",
        "sparsity_type": "2:4",
    }
    assert quality.options("gated", "0.6")["sparsity_ratio"] == 0.6
    assert quality.options("gated@expert_tokens=all@expert_shrinkage=64", "2:4") == {
        "prune_method": "gated",
        "sparsity_type": "2:4",
        "expert_tokens": "all",
        "expert_shrinkage": 64.0,
    }


@pytest.mark.parametrize(
    "kind, own",
    [(LlamaConfig, {}), (MixtralConfig, small_moe.SIZES | small_moe.BALANCE)],
    ids=["llama", "moe"],
)
def test_a_small_model_learns(kind, own):
    tiny = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = kind(**small_llama.BYTES | own | tiny | dict(num_key_value_heads=2))
    text = torch.arange(600) % 7
    model = small_llama.train(config, text, steps=25, batch=2, bf16=False)
    with torch.no_grad():
        output = model(text[None, :256], labels=text[None, :256])
    assert output.loss < 4.5  # 5.5 untrained
    if kind is MixtralConfig:
        assert output.aux_loss < 4  # 2: all experts are used alike; 8: two of them get all tokens
