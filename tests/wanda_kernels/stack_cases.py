"""Stacks of experts in every storage that models use, and a comparison with a loop over single matrices."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.wanda_kernels.cases import bits, poisoned_mask, random_weight
from wanda_kernels import reference

OPERATIONS = ("prune_rows_", "prune_nm_")
SENTINEL = 7.0
# name -> (shape of the parameter, the view of it that is the stack)
LAYOUTS: dict[str, Callable[[int, int, int], tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]] = {
    "contiguous": lambda e, o, i: ((e, o, i), lambda p: p),
    "transposed": lambda e, o, i: ((e, i, o), lambda p: p.transpose(1, 2)),
    "some rows": lambda e, o, i: ((e, 2 * o + 1, i), lambda p: p[:, 1 : o + 1]),
    "every second row": lambda e, o, i: ((e, 2 * o, i), lambda p: p[:, 1::2]),
    "experts apart": lambda e, o, i: ((e, o * i + 3), lambda p: p[:, : o * i].unflatten(1, (o, i))),
    "some columns": lambda e, o, i: ((e, o, i + 3), lambda p: p[..., 2 : i + 2]),
    "transposed, some rows": lambda e, o, i: ((e, i, 2 * o + 1), lambda p: p[..., o:-1].transpose(1, 2)),
    "transposed, every second row": lambda e, o, i: ((e, i, 2 * o), lambda p: p[..., ::2].transpose(1, 2)),
    "experts innermost": lambda e, o, i: ((o, i, e), lambda p: p.permute(2, 0, 1)),
}
TRANSPOSED = tuple(name for name in LAYOUTS if name.startswith("transposed"))


def stored(weight: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(parameter, view): a parameter full of SENTINEL but for the view, which holds the weight."""
    shape, view_of = LAYOUTS[layout](*weight.shape)
    parameter = torch.full(shape, SENTINEL, dtype=weight.dtype, device=weight.device)
    view = view_of(parameter)
    view.copy_(weight)
    return parameter, view


def random_stack(n_experts: int, n_rows: int, n_cols: int, dtype: torch.dtype) -> Tensor:
    return random_weight(n_experts * n_rows, n_cols, dtype).view(n_experts, n_rows, n_cols)


def stack_scale(kind: str, n_experts: int, n_rows: int, n_cols: int) -> Tensor | None:
    """None, one row for each expert, one row stored columns first, or one value for each weight."""
    generator = torch.Generator().manual_seed(3)
    shape = {"none": None, "matrix": (n_experts, n_rows, n_cols)}.get(kind, (n_experts, n_cols))
    if shape is None:
        return None
    scale = torch.randn(shape, generator=generator).square() * 10
    scale[..., torch.arange(n_cols) % 5 == 3] = 0.0
    return scale.t().contiguous().t() if kind == "columns first" else scale


SCALES = ("none", "vector", "columns first", "matrix")


def by_expert(operation: str, weight: Tensor, scale: Tensor | None, *rule) -> tuple[Tensor, Tensor]:
    """(weight, mask) of the reference, one contiguous matrix at a time."""
    experts, masks = [], []
    for expert, single in enumerate(weight):
        result, mask = single.contiguous().clone(), poisoned_mask(*single.shape, single.device)
        getattr(reference, operation)(result, None if scale is None else scale[expert], *rule, mask)
        experts.append(result)
        masks.append(mask)
    return torch.stack(experts), torch.stack(masks)


def assert_equals_a_loop(run: Callable, operation: str, weight: Tensor, scale, *rule, layout: str) -> None:
    """`run(view, scale, *rule, mask)` prunes as the reference prunes each expert, and nothing around it."""
    expected, expected_mask = by_expert(operation, weight, scale, *rule)
    parameter, view = stored(weight, layout)
    mask = poisoned_mask(weight.shape[1], weight.shape[2], weight.device).repeat(len(weight), 1, 1)
    run(view, scale, *rule, mask)
    said = f"{operation}{rule} on {list(weight.shape)} {weight.dtype}, {layout}"
    assert torch.equal(bits(view.contiguous()), bits(expected)), said
    assert torch.equal(mask, expected_mask), said
    view.fill_(SENTINEL)
    assert (parameter == SENTINEL).all(), said
