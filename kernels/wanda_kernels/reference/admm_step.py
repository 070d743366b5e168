"""One step of ADMM behind its product: project each row to its pattern, and update the dual.

`operations/solver.py` documents the arguments.
"""

import torch
from torch import Tensor

from wanda_kernels.reference.prune_nm import lowest_of_groups
from wanda_kernels.reference.prune_rows import lowest_of_rows


def admm_step_(
    primal: Tensor, dual: Tensor, dense: Tensor, pruned: Tensor, num_pruned: int, n: int, m: int, ratio: float
) -> Tensor:
    u = primal + dual
    scores = u.abs()
    now = lowest_of_groups(scores, n, m) if m else lowest_of_rows(scores, num_pruned)
    changed = (now != pruned).sum()
    pruned.copy_(now)
    dual.copy_(torch.where(now, u * ratio, 0.0))
    primal.copy_((dense - torch.where(now, 0.0, u)) + dual)
    return changed
