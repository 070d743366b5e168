"""Weights and backends that the tests of packed rows share."""

import pytest
import torch

from tests.wanda_kernels.conftest import device_of
from tests.wanda_kernels.native_cases import ISAS
from wanda_kernels import PackedRows
from wanda_kernels.dispatch import backends


def settings(operation: str) -> list:
    """(backend, instruction set or "") of all that can serve an operation here."""
    names = [b for b in backends.BACKENDS if not backends.why_not(operation, device_of(b), b)]
    pairs = [(name, isa) for name in names for isa in (ISAS if name == "cpu" else ("",))]
    return [pytest.param(pair, id="-".join(filter(None, pair))) for pair in pairs]


def weight_of(shape, dtype, kept_of_row=None, seed=0):
    """Half of each row kept, or that many; -0.0, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    special = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf])
    is_special = torch.rand(shape, generator=generator) < 0.1
    weight = torch.where(is_special, special[torch.arange(shape[-1]) % 4], weight)
    order = torch.rand(shape, generator=generator).argsort(-1)
    kept = shape[-1] // 2 if kept_of_row is None else torch.tensor(kept_of_row)[:, None]
    return torch.where(order < kept, weight, 0.0).to(dtype)


def on(device: str, packed: PackedRows) -> PackedRows:
    return PackedRows(*(None if each is None else each.to(device) for each in packed))
