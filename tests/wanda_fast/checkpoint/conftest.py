"""Packed folders that several files of tests read, and change copies of."""

import pytest
import torch

import wanda_fast
from tests.wanda_fast.checkpoint.packed_folders import pruned, saved


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A packed folder whose weights have as many values in every row, and padding bits."""
    folder = tmp_path_factory.mktemp("even")
    wanda_fast.pack(saved(pruned("odd widths", torch.bfloat16, "rows"), folder / "dense"), folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    wanda_fast.pack(
        saved(pruned("odd widths", torch.bfloat16, "uneven"), folder / "dense"), folder / "packed"
    )
    return folder / "packed"
