"""Before the work: how much of a model can be pruned, and whether method and pattern fit it."""

import logging

from torch import nn

from wanda_fast.errors import PatternError
from wanda_fast.model.architecture import Block, ignored_linears, reach
from wanda_fast.prune.methods import Connect, Dense, Gated, Method, SparseGPT
from wanda_fast.prune.patterns import Pattern, Variant
from wanda_fast.report import Report

logger = logging.getLogger(__name__)


def survey(
    model: nn.Module,
    blocks: list[Block],
    method: Method,
    pattern: Pattern,
    ignore: tuple[str, ...],
    use_variant: bool,
    report: Report,
) -> None:
    """Note how many weights can be pruned. Warn if model or flags keep the method from what its name says.

    Raises: `PatternError` if the pattern does not fit a linear or the method.
    """

    def warn(sentence: str) -> None:
        logger.warning("%s", sentence)
        report.warnings.append(sentence)

    for ignored, names in ignored_linears(model, ignore).items():
        logger.info("--ignore %s matches %d linears: %s", ignored, len(names), ", ".join(names))
    report.reach = reach(model, blocks)
    outside = report.reach.blocks - report.reach.prunable
    if outside > 0.05 * report.reach.blocks and not ignore:
        warn(
            f"{outside:,} of the blocks' {report.reach.blocks:,} weights are in no prunable nn.Linear "
            f"(e.g. {report.reach.largest_out_of_reach}) and stay dense"
        )
    if not isinstance(method, Dense):
        for block in blocks:
            for linear in block.linears:
                pattern.check(linear.name, linear.module.in_features)
    gated = any(linear.gated for block in blocks for linear in block.linears)
    if isinstance(method, Connect | Gated) and not gated:
        warn(f"{type(model).__name__} has no gated MLP: {method.name} prunes it as wanda")
    if isinstance(method, SparseGPT) and pattern.rule is None:
        raise PatternError(
            f"{method.name} chooses unstructured or N:M as it updates, not {pattern}: "
            f"other methods take that pattern, with --update obs too"
        )
    if use_variant and not (isinstance(pattern, Variant) and method.takes_variant):
        warn(f"--use_variant has no effect on {method.name} with {pattern}")
