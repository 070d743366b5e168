"""Before the work: what the pruner can touch of a model, and whether pattern, flags and tokens fit it."""

import logging
import sys

from torch import Tensor, nn

from wanda_fast.errors import CalibrationError, UnknownMethodError
from wanda_fast.model.architecture import Block, ignored_linears
from wanda_fast.pruning.methods import Method
from wanda_fast.pruning.patterns import Pattern
from wanda_fast.report import Reach, Report

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
    """Count the reach; warn where the model or the flags make the method another than its name says."""

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
    if method.prunes:
        for block in blocks:
            for linear in block.linears:
                pattern.check(linear.name, linear.module.in_features)
    gated = any(linear.gated for block in blocks for linear in block.linears)
    if method.wants_gated_mlp and not gated:
        warn(f"{type(model).__name__} has no gated MLP: {method.name} prunes it as wanda")
    method.check(pattern)
    if use_variant and not (pattern.is_variant and method.takes_variant):
        warn(f"--use_variant has no effect on {method.name} with {pattern}")


def reach(model: nn.Module, blocks: list[Block]) -> Reach:
    """Count the prunable weights, all weights of the blocks (2-D and up), and all parameters of the model."""
    prunable = {id(linear.module.weight) for block in blocks for linear in block.linears}
    matrices = {
        f"{block.name}.{name}": parameter
        for block in blocks
        for name, parameter in block.module.named_parameters()
        if parameter.dim() >= 2
    }
    outside = {name: p.numel() for name, p in matrices.items() if id(p) not in prunable}
    return Reach(
        prunable=sum(linear.module.weight.numel() for block in blocks for linear in block.linears),
        blocks=sum(parameter.numel() for parameter in matrices.values()),
        model=sum(parameter.numel() for parameter in model.parameters()),
        largest_out_of_reach=max(outside, key=outside.get) if outside else None,
    )


def context_of(model: nn.Module) -> int:
    """The longest sequence the model was made for; without a word on it, no limit."""
    config = model.config.get_text_config()
    return (
        getattr(config, "max_position_embeddings", None)
        or getattr(config, "n_positions", None)
        or sys.maxsize
    )


def require_fit(model: nn.Module, token_ids: Tensor, what: str) -> None:
    """Raise `CalibrationError` where token ids would index past the model's positions or vocabulary."""
    context, vocabulary = context_of(model), model.config.get_text_config().vocab_size
    if token_ids.shape[1] > context:
        raise CalibrationError(
            f"{what} windows of {token_ids.shape[1]} tokens exceed the model's context of {context}: "
            f"lower --seqlen"
        )
    lowest, highest = token_ids.min().item(), token_ids.max().item()
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise CalibrationError(f"{what} token id {wrong} is outside the model's vocabulary of {vocabulary}")


def require_sequential(sequential: str) -> None:
    if sequential not in ("block", "linear"):
        raise UnknownMethodError(f"sequential must be 'block' or 'linear', got {sequential!r}")
