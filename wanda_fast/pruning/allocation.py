"""How much is pruned where: ratios by name, or by the outliers of each block (OWL, arXiv 2310.05175)."""

import torch

from wanda_fast.errors import AllocationError
from wanda_fast.hidden_states import Activations, enter_next_chain_
from wanda_fast.model.architecture import Block, matching
from wanda_fast.model.block_source import BlockSource
from wanda_fast.pruning.block_loop import read_block
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.patterns import NM, Pattern
from wanda_fast.pruning.selection import Selection
from wanda_fast.pruning.summing import complete
from wanda_fast.timer import Clock, Phases, Progress
from wanda_kernels.forward import reused_memory

# The values of OWL's examples: a score is an outlier if it is this many times its block's mean, and a
# block's ratio differs from the mean by SPREAD at most, before the mean is restored.
OUTLIER, SPREAD = 5.0, 0.08


def ratios_by_name(wanted: dict[str, float], names: list[str]) -> dict[str, float]:
    """The ratio of each linear that a pattern of names matches; the last pattern counts.

    Args:
        wanted: pattern, as in `find_blocks`, to ratio.
        names: of all linears.
    Raises: `AllocationError` if a pattern matches nothing, or a ratio is none.
    """
    found = {}
    for pattern, ratio in wanted.items():
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise AllocationError(f"allocation: the ratio of {pattern!r} must be in [0, 1), got {ratio!r}")
        matched = matching(pattern, names, "allocation pattern")
        if not matched:
            example = f", e.g. {names[0]}" if names else ""
            raise AllocationError(
                f"allocation pattern {pattern!r} matches none of the {len(names)} linears{example}"
            )
        found |= dict.fromkeys(matched, float(ratio))
    return found


def ratios_by_outliers(shares: dict[str, float], weights: dict[str, int], mean: float) -> dict[str, float]:
    """OWL's ratio of each block: lower where more scores are outliers.

    Args:
        shares: of outliers, by block.
        weights: numbers of prunable weights, by block.
        mean: of the ratios, weighted by `weights`.
    Raises: `AllocationError` if a ratio is beyond [0, 1).
    """
    # A block whose linears are all ignored has none.
    weights = {name: count for name, count in weights.items() if count}
    shares = {name: shares[name] for name in weights}
    if not weights:
        return {}
    low, high = min(shares.values()), max(shares.values())
    apart = {name: (share - low) / (high - low) if high > low else 0.0 for name, share in shares.items()}
    total = sum(weights.values())
    center = sum(apart[name] * weights[name] for name in weights) / total
    ratios = {name: mean - 2 * SPREAD * (apart[name] - center) for name in weights}
    for name, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise AllocationError(f"allocation owl: {name} would have a ratio of {ratio:.3f}, beyond [0, 1)")
    return ratios


def patterns_with(ratios: dict[str, float], pattern: Pattern, weights: dict[str, int]) -> dict[str, Pattern]:
    """A pattern for each name. Of N:M, each N is the nearest that keeps the mean of all.

    Args:
        weights: numbers of weights, by the same names.
    """
    if not isinstance(pattern, NM):
        # One object for each ratio: experts that share it are pruned together.
        made = {ratio: pattern.with_ratio(ratio) for ratio in ratios.values()}
        return {name: made[ratio] for name, ratio in ratios.items()}
    kept = {name: pattern.m * (1 - ratio) for name, ratio in ratios.items()}
    n = {name: min(max(int(each), 1), pattern.m - 1) for name, each in kept.items()}
    missing = sum((kept[name] - n[name]) * weights[name] for name in kept)
    for name in sorted(kept, key=lambda name: n[name] - kept[name]):
        if missing >= weights[name] / 2 and n[name] < pattern.m - 1:
            n[name] += 1
            missing -= weights[name]
    made = {each: NM(each, pattern.m) for each in n.values()}
    return {name: made[each] for name, each in n.items()}


@torch.no_grad()
@reused_memory()
def outlier_shares(
    source: BlockSource,
    selection: Selection,
    activations: Activations,
    clock: Clock,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The share of outliers among wanda's scores of each dense block, by its name. Nothing is pruned.

    Args:
        selection: of the method wanda.
        activations: the first block's inputs. They leave the last block.
    """
    shares, total, inputs = {}, len(source.blocks), activations.calibration
    for index, block in enumerate(source.blocks):
        phases = Phases(clock, progress, index, total, block.name)
        with read_block(source, index), phases("outliers"):
            statistics = selection.statistics(block, clock)
            with statistics.gathering():
                inputs.advance_(index, block.module)
            complete(statistics, block, selection.ranks)
            shares[block.name] = _outliers(block, statistics)
        if index + 1 < total and source.blocks[index + 1].chain > block.chain:
            enter_next_chain_(source, index, [inputs])
    return shares


def _outliers(block: Block, statistics: BlockStatistics) -> float:
    """An expert that no token reached has no scores."""
    scored = [linear for linear in block.linears if linear.name in statistics.by_name]

    def scores(linear) -> torch.Tensor:
        return linear.weight.data.float().abs() * statistics.by_name[linear.name].acc.sqrt()

    weights = sum(linear.weight.numel() for linear in scored)
    mean = sum(scores(linear).sum(dtype=torch.float64) for linear in scored) / max(weights, 1)
    found = sum((scores(linear) > OUTLIER * mean).sum() for linear in scored)
    return float(found) / max(weights, 1)
