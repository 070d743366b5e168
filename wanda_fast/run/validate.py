"""Before the work: how much of a model can be pruned, and whether method and pattern fit it."""

import logging
from collections import Counter

from torch import nn

from wanda_fast.checkpoint.load import DTYPES
from wanda_fast.errors import DtypeError
from wanda_fast.model.architecture import Block, ignored_linears
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.methods import Method
from wanda_fast.pruning.patterns import Pattern
from wanda_fast.report.contents import Reach, Report

logger = logging.getLogger(__name__)


def survey(
    model: nn.Module,
    blocks: list[Block],
    method: Method,
    pattern: Pattern,
    ignore: tuple[str, ...],
    use_variant: bool,
    report: Report,
) -> list[str]:
    """Note how many weights can be pruned.

    Returns: warnings, if model or flags keep the method from what its name says.
    Raises: `PatternError` if the pattern does not fit a linear or the method; `DtypeError`.
    """
    warnings: list[str] = []
    for ignored, names in ignored_linears(model, ignore).items():
        logger.info("--ignore %s matches %d linears: %s", ignored, len(names), ", ".join(names))
    report.reach = reach(model, blocks)
    outside = report.reach.blocks - report.reach.prunable
    if outside > 0.05 * report.reach.blocks and not ignore:
        warnings.append(
            f"{outside:,} of the blocks' {report.reach.blocks:,} weights are in no prunable matrix "
            f"(e.g. {report.reach.largest_out_of_reach}) and stay dense"
        )
    if method.prunes and not any(block.linears for block in blocks):
        warnings.append("no linear is left to prune: --ignore matches all of them")
    if method.prunes:
        for block in blocks:
            for linear in block.linears:
                _require_dtype(linear)
                pattern.check(linear.name, linear.in_features)
    gated = any(linear.gated for block in blocks for linear in block.linears)
    if method.wants_gated_mlp and not gated:
        warnings.append(f"{type(model).__name__} has no gated MLP: {method.name} prunes it as wanda")
    method.check(pattern)
    if use_variant and not (pattern.is_variant and method.takes_variant and method.score is None):
        warnings.append(f"--use_variant has no effect on {method.name} with {pattern}")
    return warnings


def _require_dtype(linear: Linear) -> None:
    weight = linear.weight
    if weight.dtype not in DTYPES.values():
        raise DtypeError(
            f"{linear.name} is {weight.dtype} {list(weight.shape)}: a model in memory is pruned in "
            f"{', '.join(DTYPES)}; convert it first, e.g. with model.float(), or pass the checkpoint's folder"
        )


def reach(model: nn.Module, blocks: list[Block]) -> Reach:
    """Count the prunable weights, all weights of the blocks (2-D and up), and all parameters of the model."""
    prunable = Counter()
    for linear in (linear for block in blocks for linear in block.linears):
        prunable[linear.parameter] += linear.weight.numel()
    matrices = {
        f"{block.name}.{name}": parameter
        for block in blocks
        for name, parameter in block.module.named_parameters()
        if parameter.dim() >= 2
    }
    outside = {name: p.numel() - prunable[name] for name, p in matrices.items() if p.numel() > prunable[name]}
    return Reach(
        prunable=prunable.total(),
        blocks=sum(parameter.numel() for parameter in matrices.values()),
        model=sum(parameter.numel() for parameter in model.parameters()),
        largest_out_of_reach=max(outside, key=outside.get) if outside else None,
    )
