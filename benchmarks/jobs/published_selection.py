"""Which weights the published algorithms prune, and SparseGPT's update, on one weight matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

Lowest = Callable[[Tensor, int], Tensor]  # of scores [rows, columns]: the columns of each row's lowest


def factor(hessian: Tensor, dampening: float = 0.01) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, which is changed."""
    hessian.diagonal().add_(dampening * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def lowest_by_stable_sort(scores: Tensor, count: int) -> Tensor:
    """Equal scores: the lower column."""
    return torch.sort(scores, dim=1, stable=True).indices[:, :count]


def lowest_by_topk(scores: Tensor, count: int) -> Tensor:
    """As the published code; equal scores: any column."""
    return torch.topk(scores, count, dim=1, largest=False).indices


def update(
    weight: Tensor,
    hessian: Tensor,
    root: Tensor | None,
    pattern: str,
    method: str = "sparsegpt",
    lowest: Lowest = lowest_by_stable_sort,
) -> Tensor:
    """SparseGPT on one weight [out, in], in place, by the published column loop; returns what was pruned.

    "seq": the mask is wanda's or magnitude's, of the weight as it was. "iter" and sparsegpt: chosen in each
    block of columns (for a ratio: one threshold), or in each group as its first column comes (for n:m).
    """
    w = weight.float().clone()
    given = None
    if method.endswith("seq"):
        scores = w.abs() * root if "wanda" in method else w.abs()
        given = select(scores, pattern, "wanda" if "wanda" in method else "magnitude", lowest=lowest)
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    w[:, unused] = 0
    u = factor(hessian)

    def importances(values: Tensor, first: int) -> Tensor:
        columns = slice(first, first + values.shape[1])
        if "wanda" in method:
            return values.abs() * root[:, columns]
        return values.abs() if "mag" in method else values**2 / u.diagonal()[columns] ** 2

    pruned = update_by_columns(w, u, pattern, importances, given, lowest)
    weight.copy_(w)
    return pruned


def update_by_columns(
    w: Tensor,
    u: Tensor,
    pattern: str,
    importances: Callable[[Tensor, int], Tensor],
    given: Tensor | None = None,
    lowest: Lowest = lowest_by_topk,
    width: int = 128,
) -> Tensor:
    """The loop over columns of fp32 w [out, in], given the factor u.

    importances: of some columns' values and the index of the first of them.
    """
    kept, group = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    pruned = torch.zeros_like(w, dtype=torch.bool)
    for first in range(0, w.shape[1], width):
        last = min(first + width, w.shape[1])
        values, u_block = w[:, first:last].clone(), u[first:last, first:last]
        gone, errors = pruned[:, first:last], torch.zeros_like(values)
        if given is not None:
            gone |= given[:, first:last]
        elif not group:
            scores = importances(values, first)
            threshold = scores.flatten().sort().values[int(scores.numel() * float(pattern))]
            gone |= scores <= threshold
        for i in range(last - first):
            if group and given is None and i % group == 0:
                scores = importances(values[:, i : i + group], first + i)
                gone.scatter_(1, i + lowest(scores, group - kept), True)
            error = values[:, i].masked_fill(~gone[:, i], 0) / u_block[i, i]
            values[:, i:] -= error[:, None] @ u_block[i : i + 1, i:]
            errors[:, i] = error
        w[:, first:last] = values.masked_fill(gone, 0)
        w[:, last:] -= errors @ u[first:last, last:]
    return pruned


def select(scores: Tensor, pattern: str, method: str, lowest: Lowest = lowest_by_stable_sort) -> Tensor:
    """Which of scores [out, in] go: a bool mask."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if ":" in pattern:
        kept, group = map(int, pattern.split(":"))
        for first in range(0, scores.shape[1], group):
            part = scores[:, first : first + group].float()
            mask.scatter_(1, first + lowest(part, group - kept), True)
        return mask
    if method == "magnitude":
        return scores <= scores.flatten().sort().values[int(scores.numel() * float(pattern))]
    return mask.scatter_(1, lowest_by_stable_sort(scores, int(scores.shape[1] * float(pattern))), True)
