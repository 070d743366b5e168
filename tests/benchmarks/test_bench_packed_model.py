"""The table of packed models: integer linears multiply as they say, folders have the asked sparsity."""

import pytest
import torch
from torch import nn

from benchmarks.jobs import bench_packed_model
from benchmarks.jobs.integer_linears import Int4Linear, Int8Linear


@pytest.mark.parametrize(("kind", "close"), [(Int8Linear, 0.9999), (Int4Linear, 0.99)])
@pytest.mark.parametrize("rows", [1, 9])
def test_integer_linear_is_near_the_dense_one(kind, close, rows):
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=False).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(rows, 1, 128).to(torch.bfloat16)
    got, expected = kind(linear)(x), linear(x)
    assert got.shape == expected.shape and got.dtype == torch.bfloat16
    got, expected = got.flatten().float(), expected.flatten().float()
    assert nn.functional.cosine_similarity(got, expected, dim=0) > close
    assert 0.98 < got.norm() / expected.norm() < 1.02


def test_folders_of_random_weights_and_what_a_process_measures(tmp_path):
    dense, packed = bench_packed_model.make_folders("tiny", tmp_path)
    half, more = (bench_packed_model.load("packed", str(folder)) for folder in packed)
    name = "model.layers.1.mlp.down_proj"
    assert half.get_submodule(name).values.shape == (64, 96)
    assert more.get_submodule(name).values.shape == (64, 192 - 115)
    found = bench_packed_model.run("dense int4", str(dense), prompt=16, steps=2, windows=0)
    assert found.keys() == {"bytes", "prefill 1", "decode 1", "decode 8", "peak"}
    line = bench_packed_model._line("dense int4", [found | {"decode 1": rate} for rate in (1, 9, 3)])
    assert line[0] == "dense int4" and line[4] == "3.0" and line[-1] == "-"
