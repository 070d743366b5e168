"""`wanda-fast bench`: which linears it finds, what it multiplies by, how it sums, and what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tests import tiny_models
from wanda_fast import errors
from wanda_fast.cli.main import app
from wanda_fast.cli.tables import bench_table
from wanda_fast.inference import measure, stopwatch
from wanda_fast.inference.measure import Bench, ShapeTimes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config_alone(tmp_path):
    """A folder with a config.json and nothing else."""

    def write(name):
        tiny_models.CONFIGS[name]().save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def test_shapes_are_those_of_the_blocks_linears(config_alone):
    shapes, dtype = measure.linear_shapes(config_alone("llama3"))
    assert shapes == {(64, 64): 4, (32, 64): 4, (160, 64): 4, (64, 160): 2}
    assert dtype == torch.float32


def test_experts_in_one_parameter_are_no_linears(config_alone):
    shapes, _ = measure.linear_shapes(config_alone("mixtral"))
    assert shapes == {(64, 64): 4, (32, 64): 4}


def test_packed_variants_have_the_asked_number_of_values_in_every_row():
    variants = measure._variants((24, 203), 3, torch.bfloat16, "cpu", ["0.5", "0.6", "2:4"])
    assert list(variants) == ["dense bfloat16", "dense float32", "packed 50%", "packed 60%", "2:4"]
    assert variants["2:4"] == "not on CPUs"
    for name, kept in (("packed 50%", 203 - 101), ("packed 60%", 203 - 121)):
        assert len(variants[name]) == 3
        weight = variants[name][0].weight
        assert (weight.count_nonzero(1) == kept).all()
        # Other columns in other rows.
        assert len({tuple(row.nonzero().flatten().tolist()) for row in weight}) == 24


def test_two_of_four_needs_a_multiple_of_four_inputs():
    assert measure._two_of_four(torch.randn(8, 6), 1) == "6 inputs are no multiple of 4"


def test_the_gpu_of_the_tensors_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(measure, "_in_turn", lambda products, x: int)
    measure._measured({"dense": []}, SimpleNamespace(device=torch.device("cuda:1")), 0.0)
    assert set(waited) == {"cuda:1"}


def test_rows_named_twice_are_measured_once(config_alone, monkeypatch):
    monkeypatch.setattr(stopwatch, "medians", lambda calls, *_: dict.fromkeys(calls, 1.0))
    times = measure.bench(config_alone("llama3"), rows=[8, 1, 8], patterns=["0.5"]).times
    assert [each.rows for each in times] == [8, 1] * 4


def test_totals_count_each_linear():
    times = [
        ShapeTimes((2, 4), 3, 1, {"dense": 1.0, "2:4": "not on CPUs"}),
        ShapeTimes((4, 4), 2, 1, {"dense": 0.5, "2:4": "not on CPUs"}),
        ShapeTimes((2, 4), 3, 8, {"dense": 100.0, "2:4": "not on CPUs"}),
    ]
    assert Bench("m", "cpu", torch.float32, 1, times).total(1) == {"dense": 4.0, "2:4": "not on CPUs"}


def test_gain_is_over_the_fastest_dense_variant():
    times = [ShapeTimes((2, 4), 2, 1, {"dense bfloat16": 0.5, "dense float32": 0.2, "packed 50%": 0.1})]
    table = bench_table(Bench("m", "cpu", torch.bfloat16, 1, times))
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == ["2 of 2x4", "all", "gain"]
    assert [column[1:] for column in cells[2:]] == [["1,000", "0.40x"], ["400", "1.00x"], ["200", "2.00x"]]


def test_reasons_of_all_shapes_are_below_the_table():
    times = [
        ShapeTimes((4, 4), 1, 1, {"dense": 0.5, "2:4": 0.25}),
        ShapeTimes((4, 6), 1, 1, {"dense": 0.5, "2:4": "6 inputs"}),
        ShapeTimes((4, 6), 1, 8, {"dense": 0.5, "2:4": "6 inputs"}),
    ]
    table = bench_table(Bench("m", "cuda", torch.float32, 1, times))
    assert table.caption == "2:4: 6 inputs"


def test_every_variant_of_a_round_is_timed(monkeypatch):
    monkeypatch.setattr(stopwatch, "seconds", lambda call, device, repeats=1: call())
    waits = {"fast": iter([9, 1, 1, 1, 3]), "slow": iter([9, 1, 7, 8, 9])}
    calls = {name: lambda each=each: next(each) for name, each in waits.items()}
    assert stopwatch.medians(calls, "cpu", budget_s=0) == {"fast": 1, "slow": 8}


def test_short_calls_are_repeated():
    calls = []
    stopwatch.seconds(lambda: calls.append(1), "cpu", repeats=5)
    assert len(calls) == 5


def test_command_prints_a_line_for_each_shape_and_the_sum(config_alone, monkeypatch):
    monkeypatch.setattr(stopwatch, "medians", lambda calls, *_: {name: len(calls[name]()) for name in calls})
    words = ["bench", config_alone("llama3"), "--rows", "1,9", "--device", "cpu"]
    said = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert said.exit_code == 0, said.output
    assert "4 of 64x64" in said.output and "2 of 64x160" in said.output and "2:4: not on CPUs" in said.output
    assert said.output.count("gain") == 2


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            dict(rows=[10**12]),
            errors.OptionError,
            r"at most 1,048,576, got \[1000000000000\]",
        ),
        (dict(rows=[0]), errors.OptionError, r"rows must be positive numbers, .*, got \[0\]"),
        (dict(patterns=["1.5"]), errors.OptionError, "between 0 and 1, got '1.5'"),
        (dict(patterns=["4:8"]), errors.OptionError, "a pattern is 2:4, or"),
        (dict(dtype="int8"), errors.CheckpointError, "dtype must be"),
    ],
)
def test_bad_options_are_refused(options, error, sentence, config_alone):
    with pytest.raises(error, match=sentence):
        measure.bench(config_alone("llama3"), **options)


def test_a_model_in_float64_is_refused(config_alone):
    folder = Path(config_alone("llama3"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    with pytest.raises(errors.OptionError, match="weights of float64 are not measured: choose a dtype"):
        measure.bench(str(folder))


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none"}))
    with pytest.raises(errors.CheckpointError, match="has no config.json of a model"):
        measure.bench(str(tmp_path))


def test_a_model_without_linears_is_refused(config_alone):
    with pytest.raises(errors.NoPrunableBlockError, match="have no nn.Linear"):
        measure.bench(config_alone("gpt2"))
