"""The option `expect`: the published row that a run is held against, and the run's own protocol."""

from dataclasses import fields
from pathlib import Path

from torch import nn

from wanda_fast.errors import ExpectedError
from wanda_fast.options.all_options import Options
from wanda_fast.options.option import WHAT
from wanda_fast.pruning.registry import METHODS
from wanda_fast.report.expected import SETTING, Row, find_row, held_against
from wanda_fast.run.inputs import DEFAULT_NSAMPLES
from wanda_fast.run.job import Job


def expected_row(options: Options, job: Job) -> Row | None:
    """The row that fits the run; None if nothing is expected.

    Raises: `ExpectedError` if none does, or nothing is to be measured; `PathError`.
    """
    if options.expect is None:
        return None
    if options.eval_dataset is None:
        raise ExpectedError(f"expect {options.expect} needs a perplexity, and eval_dataset is none")
    # A method can have several names; files have the first.
    method = next(name for name, kind in METHODS.items() if kind is METHODS[options.prune_method])
    nsamples = options.nsamples or DEFAULT_NSAMPLES
    setting = (method, options.sparsity_type, job.report.recipe["sparsity_ratio"], nsamples)
    return find_row(options.expect, _name(options.model), *setting)


def _name(model: nn.Module | str | Path) -> str:
    if isinstance(model, nn.Module):
        return getattr(model.config, "_name_or_path", "") or type(model).__name__
    return str(model)


def comparison(row: Row, job: Job, perplexity: dict) -> dict:
    """What the report says of the published row beside `perplexity`."""
    recipe, evaluation, protocol, others = job.report.recipe, job.evaluation, {}, []
    if evaluation is not None:
        window = evaluation.windows.shape[1]
        protocol |= {"text": evaluation.label, "window": window, "bos": evaluation.bos}
    if evaluation is not None and evaluation.is_limited:
        others.append(f"the first {len(evaluation.windows)} windows only")
    if job.token_ids is not None:
        nsamples, seqlen = job.token_ids.shape[:2]
        protocol |= {"calibration": str(recipe["dataset"]), "nsamples": nsamples, "seqlen": seqlen}
    return held_against(row, perplexity, protocol, others + _changed(recipe))


def _changed(recipe: dict) -> list[str]:
    """The options of how to prune that are not at their defaults, which published methods have."""
    own = [each for each in fields(Options) if each.name not in SETTING and each.metadata["panel"] == WHAT]
    own += [each for each in fields(Options) if each.name == "forward_dtype"]
    values = {each.name: (recipe[each.name], each.default) for each in own}
    return [f"{name} {value}" for name, (value, default) in values.items() if value not in (default, [])]
