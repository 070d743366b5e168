"""Files of published figures: those in docs/published, how a run's row is found, what is said beside it."""

import json
from pathlib import Path

import pytest

from wanda_fast import errors
from wanda_fast.pruning.methods import require_method
from wanda_fast.pruning.patterns import parse_pattern
from wanda_fast.report.expected import (
    figures_in_words,
    find_row,
    held_against,
    protocol_in_words,
    read_rows,
)

FILES = sorted((Path(__file__).parents[3] / "docs" / "published").glob("*.json"))
ROW = dict(model="a/Small", prune_method="wanda", sparsity_type="2:4", sparsity_ratio=0.5, pruned=12.0)
SETTING = ("wanda", "2:4", 0.5, 128)


@pytest.fixture
def written(tmp_path):
    def written(*rows, **others):
        file = tmp_path / "table.json"
        file.write_text(json.dumps({"source": "a paper", "rows": rows} | others))
        return file

    return written


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_files_name_what_exists(file):
    rows = read_rows(file)
    for row in rows:
        require_method(row.prune_method)
        assert parse_pattern(row.sparsity_type, row.sparsity_ratio).ratio == row.sparsity_ratio
        assert row.dense is None or row.dense < row.pruned
        setting = (row.prune_method, row.sparsity_type, row.sparsity_ratio, row.protocol.get("nsamples", 128))
        assert find_row(file, row.model.upper(), *setting) == row
    assert rows


def test_there_are_files():
    assert len(FILES) == 5


def test_a_row_is_found_by_the_last_part_of_the_model(written):
    file = written(ROW, ROW | {"sparsity_type": "4:8"}, ROW | {"sparsity_ratio": 0.6})
    for model in ("a/Small", "small", "/data/SMALL/", "b/small"):
        assert find_row(file, model, *SETTING).setting == "wanda 2:4 0.5"
    assert find_row(f"{file}:Small", "/data/mine", *SETTING).model == "a/Small"


def test_a_row_with_its_own_number_of_samples(written):
    file = written(
        *(ROW | {"nsamples": n, "pruned": 10 + n} for n in (1, 16)),
        protocol={"nsamples": 128, "seqlen": 64, "bos": None},
    )
    row = find_row(file, "small", "wanda", "2:4", 0.5, 16)
    assert row.pruned == 26 and row.protocol == {"nsamples": 16, "seqlen": 64}
    with pytest.raises(errors.ExpectedError, match="no row for small with wanda 2:4 0.5 and 4 samples"):
        find_row(file, "small", "wanda", "2:4", 0.5, 4)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (("large", *SETTING), "has no figures of large, but of a/Small"),
        (("small", "connect", "2:4", 0.5, 128), "no row for small with connect 2:4 0.5 and 128 samples; its"),
        (("small", "wanda", "4:8", 0.5, 128), "no row for small with wanda 4:8"),
        (("small", "wanda", "2:4", 0.6, 128), "no row for small with wanda 2:4 0.6"),
    ],
)
def test_no_row_that_fits(wanted, words, written):
    with pytest.raises(errors.ExpectedError, match=words):
        find_row(written(ROW), *wanted)


def test_two_rows_that_fit(written):
    with pytest.raises(errors.ExpectedError, match="has 2 rows for small"):
        find_row(written(ROW, ROW | {"pruned": 13}), "small", *SETTING)


@pytest.mark.parametrize(
    ("row", "others", "words"),
    [
        ({"ratio": 0.5}, {}, "row 1 of expect file .* has the unknown key 'ratio'"),
        ({"pruned": None}, {}, "row 1 of expect file .* has no 'pruned'"),
        ({"pruned": "12"}, {}, "pruned must be a positive number, got '12'"),
        ({"pruned": True}, {}, "pruned must be a positive number, got True"),
        ({"dense": -1}, {}, "dense must be a positive number, got -1"),
        ({"nsamples": 1.5}, {}, "nsamples must be a positive whole number, got 1.5"),
        ({}, {"tables": []}, "expect file .* has the unknown key 'tables'"),
        ({}, {"source": None}, "expect file .* has no 'source'"),
        ({}, {"rows": {}}, "rows must be a list"),
        ({}, {"rows": [3]}, "row 1 of expect file .* must be an object, got 3"),
        ({}, {"protocol": {"windows": 3}}, "protocol of expect file .* has the unknown key 'windows'"),
        ({}, {"protocol": {"bos": "no"}}, "bos must be true or false, got 'no'"),
        ({}, {"protocol": 3}, "protocol must be an object, got 3"),
    ],
)
def test_broken_files(row, others, words, written):
    with pytest.raises(errors.ExpectedError, match=words):
        read_rows(written(ROW | row, **others))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(errors.PathError, match="expect file .*none.json cannot be read: No such file"):
        read_rows(tmp_path / "none.json")
    with pytest.raises(errors.PathError, match="cannot be read: Is a directory"):
        read_rows(tmp_path)
    (tmp_path / "half.json").write_text('{"source"')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name, words in (("half", "is not JSON"), ("list", "must be an object"), ("bytes", "is not JSON")):
        with pytest.raises(errors.ExpectedError, match=f"{name}.json {words}"):
            read_rows(tmp_path / f"{name}.json")


def test_what_is_said(written):
    protocol = {"text": "wikitext2 test", "window": 2048, "bos": False, "nsamples": 128}
    row = find_row(written(ROW | {"dense": 5.0}, protocol=protocol), "small", *SETTING)
    same = held_against(row, {"dense": 5.05, "pruned": 9.0}, protocol, [])
    assert same["dense"]["apart"] == pytest.approx(1) and same["pruned"]["apart"] == pytest.approx(-25)
    assert figures_in_words(same["pruned"]) == "published 12.00, here 9.0000, -25.00% apart"
    assert protocol_in_words(same) == "the same as published"
    own = protocol | {"window": 64, "bos": True, "calibration": "c4"}
    other = held_against(row, {}, own, ["refine 3"])
    assert figures_in_words(other["pruned"]) == "published 12.00, not measured"
    assert protocol_in_words(other) == (
        "differs from the published one: evaluation window 64 in place of 2048; BOS in every window yes in "
        "place of no; refine 3 (the source does not state: calibration set)"
    )
