"""The option `allocation`: a pattern for each linear, from a file of ratios or from the blocks' outliers."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from wanda_fast.errors import AllocationError, PathError
from wanda_fast.hidden_states import record_activations
from wanda_fast.model.architecture import Block
from wanda_fast.model.block_source import BlockSource
from wanda_fast.model.offload import Offload
from wanda_fast.pruning.allocation import (
    outlier_shares,
    patterns_with,
    ratios_by_name,
    ratios_by_outliers,
)
from wanda_fast.pruning.methods import make_method
from wanda_fast.pruning.patterns import NM, Pattern, Unstructured
from wanda_fast.pruning.selection import Selection
from wanda_fast.run.job import Job

UNIFORM, OWL = "uniform", "owl"


def allocate(wanted: object, blocks: list[Block], job: Job) -> None:
    """Set the job's patterns by the option `allocation`; with owl, they are set by `allocate_by_outliers`.

    Raises: `AllocationError`, `PathError`.
    """
    if wanted == UNIFORM:
        return
    if not isinstance(job.pattern, Unstructured | NM):
        raise AllocationError(f"allocation is for unstructured and N:M sparsity, not for {job.pattern}")
    if wanted == OWL:
        if not job.method.calibrates:
            raise AllocationError(
                f"allocation owl needs a calibration, and {job.method.name} has none: name a file of ratios"
            )
        job.by_outliers = True
        return
    linears = [linear for block in blocks for linear in block.linears]
    ratios = ratios_by_name(_ratios(wanted), [linear.name for linear in linears])
    _require_groups(ratios, job.pattern)
    weights = {linear.name: linear.weight.numel() for linear in linears if linear.name in ratios}
    job.patterns = patterns_with(ratios, job.pattern, weights)
    job.report.digests["allocation"] = hashlib.sha256(json.dumps(ratios).encode()).hexdigest()


def allocate_by_outliers(job: Job, source: BlockSource, offload: Offload) -> None:
    """Set the job's patterns by OWL, if it was requested: a pass of the calibration over the dense model."""
    if not job.by_outliers:
        return
    with job.phase("block inputs"):
        recorded = record_activations(source, offload, job.token_ids, job.batch_size, ranks=job.ranks)
    before = job.lane(recorded).selection.before
    wanda = make_method("wanda")
    selection = Selection(wanda, job.pattern, None, job.expert_options, job.ranks, before)
    shares = outlier_shares(source, selection, recorded, job.clock, job.progress)
    weights = {block.name: sum(x.weight.numel() for x in block.linears) for block in source.blocks}
    patterns = patterns_with(ratios_by_outliers(shares, weights, job.pattern.ratio), job.pattern, weights)
    pruned = [block for block in source.blocks if block.name in patterns]
    job.patterns = {linear.name: patterns[block.name] for block in pruned for linear in block.linears}


def _ratios(wanted: object) -> dict[str, float]:
    """Name pattern to ratio, as it is or from a file."""
    if isinstance(wanted, Mapping):
        return dict(wanted)
    file = Path(wanted)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PathError(
            f"allocation must be uniform, owl or a JSON file, and {file} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise AllocationError(f"allocation file {file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise AllocationError(f"allocation file {file} must hold an object of name patterns and ratios")
    return content


def _require_groups(ratios: dict[str, float], pattern: Pattern) -> None:
    """Raise `AllocationError` for a ratio that no N of N:M gives."""
    if not isinstance(pattern, NM):
        return
    m = pattern.m
    for name, ratio in ratios.items():
        kept = m * (1 - ratio)
        if abs(kept - round(kept)) > 1e-6 or not 1 <= round(kept) < m:
            raise AllocationError(
                f"allocation: no N:{m} has the ratio {ratio:g} of {name}, which is 1 - N/{m}"
            )
