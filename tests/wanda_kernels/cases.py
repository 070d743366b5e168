"""Shapes, edge cases and comparisons that the tests of all selections share.

Interpreted Triton takes about 10 ms for a pass over a row of any length, so matrices have few rows.
"""

import torch

import wanda_kernels
from wanda_kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = ("none", "vector", "matrix")
SHAPES = ((1, 1), (3, 37), (2, 129))  # odd sizes, below and above a warp's 128 columns
POISON = 0xA5


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits, so that -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.cpu().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def random_weight(n_rows: int, n_cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_rows, n_cols, generator=generator) * 0.05).to(dtype)


def edge_weight(n_cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that break a careless selection: all equal, both zeros, few values, outliers, subnormals."""
    column = torch.arange(n_cols)
    rows = [
        torch.full((n_cols,), -1.5),
        torch.where(column % 2 == 0, 0.0, -0.0),
        torch.where(column % 3 == 0, -0.0, (column % 4) * 0.25 - 0.5),
        random_weight(1, n_cols, torch.float32, seed=1)[0] * torch.where(column % 17 == 0, 1e4, 1e-3),
        column % 5 * (torch.finfo(dtype).tiny / 8),  # subnormal, exact
        torch.where(column % 7 < 2, torch.finfo(dtype).max, 1e-2 * (column % 11)),
    ]
    return torch.stack(rows).to(dtype)


def make_scale(kind: str, n_rows: int, n_cols: int, seed: int = 2) -> torch.Tensor | None:
    """A statistic with dead columns, repeated values, subnormals, and values whose products overflow."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = (n_cols,) if kind == "vector" else (n_rows, n_cols)
    scale = torch.randn(shape, generator=generator).square() * 100
    column = torch.arange(n_cols)
    scale[..., column % 11 == 3] = 0.0
    scale[..., column % 13 == 4] = 2.0
    scale[..., column % 29 == 5] = 1e-40
    scale[..., column % 31 == 6] = 3e38
    return scale


def assert_same_selection(operation: str, backend: str, device: str, weight, scale, *rule):
    """`operation` on `backend` gives the reference's bits, mask and return value."""
    n_rows, n_cols = weight.shape
    expected, expected_mask = weight.clone(), poisoned_mask(n_rows, n_cols, "cpu")
    returned = getattr(reference, operation)(expected, scale, *rule, expected_mask)
    got, mask = weight.to(device, copy=True), poisoned_mask(n_rows, n_cols, device)
    run = getattr(wanda_kernels, operation)
    value = run(got, None if scale is None else scale.to(device), *rule, mask=mask, backend=backend)
    torch.testing.assert_close(bits(got), bits(expected), rtol=0, atol=0)
    torch.testing.assert_close(mask.cpu(), expected_mask, rtol=0, atol=0)
    if returned is not None:
        assert value.dtype == returned.dtype and value.item() == returned.item()


def poisoned_mask(n_rows: int, n_cols: int, device: str) -> torch.Tensor:
    return torch.full((n_rows, -(-n_cols // 8)), POISON, dtype=torch.uint8, device=device)


def assert_only_view_changes(operation: str, backend: str, device: str, dtype, *rule, n_cols: int = 36):
    """A slice of a larger matrix is pruned; the elements around it do not change."""
    whole = random_weight(5, n_cols + 12, dtype)
    expected = whole.clone()
    inner = expected[1:4, 5 : 5 + n_cols].clone()
    scale = make_scale("vector", 3, n_cols)
    getattr(reference, operation)(inner, scale, *rule, None)
    expected[1:4, 5 : 5 + n_cols] = inner
    got = whole.to(device)
    view = got[1:4, 5 : 5 + n_cols]
    getattr(wanda_kernels, operation)(view, scale.to(device), *rule, backend=backend)
    torch.testing.assert_close(bits(got), bits(expected), rtol=0, atol=0)


def assert_refuses_nonfinite(operation: str, backend: str, device: str, *rule):
    """NaN, infinities and negative scales raise an error; the weight's bits do not change."""
    run = getattr(wanda_kernels, operation)
    for operand, value in (
        ("weight", "nan"),
        ("weight", "-inf"),
        ("scale", "nan"),
        ("scale", "inf"),
        ("scale", "-1.0"),
    ):
        weight = random_weight(3, 16, torch.bfloat16).to(device)
        scale = torch.ones(3, 16, device=device)
        {"weight": weight, "scale": scale}[operand][1, 7] = float(value)
        before = weight.clone()
        try:
            run(weight, scale, *rule, backend=backend)
        except ValueError as error:
            sentence = f"{operand} holds {float(value)} at [1, 7]; this weight was not changed"
            assert str(error) == sentence
        else:
            raise AssertionError(f"{operation} took {value} in {operand}")
        torch.testing.assert_close(bits(weight), bits(before), rtol=0, atol=0)


def assert_empty_is_nothing(operation: str, backend: str, device: str, *rule):
    for shape in ((0, 16), (3, 0)):
        weight = torch.empty(shape, device=device)
        getattr(wanda_kernels, operation)(weight, None, *rule, backend=backend)
        assert weight.shape == shape
