"""One weight is pruned by means of its Hessian: mask, mask descent, update and polish; or ADMM."""

from torch import Tensor

import wanda_kernels
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.pruning.hessian import Hessian, HessianUse
from wanda_fast.pruning.linear_reports import Outcome
from wanda_fast.pruning.methods import Method
from wanda_fast.pruning.patterns import NM, Pattern, empty_mask


def solve_(
    weight: Tensor,
    by: Method,
    scale: Tensor | None,
    pattern: Pattern,
    hessian: Hessian,
    use: HessianUse,
    mask: Tensor | None,
    others: Ranks | None = None,
) -> Outcome:
    """Prune `weight` in place and change what it keeps, as `use` says.

    Args:
        mask: receives the packed mask.
        others: the ranks that have the weight's other rows, if they are split.
    """
    sum_rows = {} if others is None else {"sum_rows": others.summed}
    if by.solves:
        ladder = hessian.ladder(use, weight.device, others)
        iterations = wanda_kernels.admm_(
            weight, ladder, pattern.rule, polish=use.polish, mask=mask, check_finite=False, **sum_rows
        )
        further = ("polish_",) if use.polish else ()
        return Outcome("admm_step_", use.dampening, further=further, iterations=iterations)
    if not use.damped:
        factor = hessian.factor_on(weight.device)
        operation = by.prune_and_update_(weight, scale, pattern, factor, mask, **sum_rows)
        return Outcome(operation, hessian.factor.dampening, further=("sparsegpt_",))
    dense = weight.clone() if use.polish else None
    operation, pruned = _choose_(weight, by, scale, pattern, hessian, use, sum_rows)
    if use.polish:
        wanda_kernels.polish_(
            weight, dense, pruned, hessian.damped(use, weight.device), use.polish, check_finite=False
        )
    if mask is not None:
        mask.copy_(wanda_kernels.pack_bits(~pruned))
    dampening = hessian.factor.dampening if use.update else use.dampening if use.polish else None
    steps = {"refine_mask_": use.refine, "sparsegpt_": use.update, "polish_": use.polish}
    return Outcome(operation, dampening, further=tuple(name for name, taken in steps.items() if taken))


def _choose_(
    weight: Tensor,
    by: Method,
    scale: Tensor | None,
    pattern: Pattern,
    hessian: Hessian,
    use: HessianUse,
    sum_rows: dict,
) -> tuple[str, Tensor]:
    """Prune `weight`, after mask descent and with SparseGPT's update if wanted.

    Returns: the name of the operation that chose, and bool `[out, in]`, True for pruned weights.
    """
    factor = hessian.factor_on(weight.device) if use.update else None
    if not use.refine:
        bits = empty_mask(weight)
        if use.update:
            operation = by.prune_and_update_(weight, scale, pattern, factor, bits, **sum_rows)
        else:
            operation = by.prune_(weight, scale, pattern, bits)
        return operation, ~wanda_kernels.unpack_bits(bits, weight.shape[1])
    operation, pruned = by.choose(weight, scale, pattern, factor, **sum_rows)
    groups = str(pattern) if isinstance(pattern, NM) else None
    matrix = hessian.damped(use, weight.device)
    wanda_kernels.refine_mask_(weight, pruned, matrix, groups, use.refine, check_finite=False)
    if use.update:
        wanda_kernels.sparsegpt_(weight, factor, None, pruned=pruned, check_finite=False)
    else:
        weight.masked_fill_(pruned, 0.0)
    return operation, pruned
