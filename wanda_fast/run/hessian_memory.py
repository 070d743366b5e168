"""Where a block's Hessians are kept, and how much memory they take with their factors."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import OutOfMemoryError
from wanda_fast.memory import free_memory
from wanda_fast.model.architecture import Block
from wanda_fast.model.experts import ExpertLinear
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.hessian import HessianUse
from wanda_fast.pruning.ladder_of_ranks import AT_ONCE
from wanda_kernels import RUNGS, host_hessian_bytes

logger = logging.getLogger(__name__)

# Matrices of the Hessian's size that exist beside it while it is factored.
FACTORING = 2
# Share of a GPU's free memory for Hessians; the rest is for weights, activations and the forward pass.
SHARE_OF_DEVICE = 0.5


def peak_bytes(widths: Iterable[int], use: HessianUse) -> int:
    """Peak bytes of one block's Hessians and factors; `widths` are the in_features of each.

    A Hessian takes 4 in^2 bytes, and FACTORING times as much again while it is factored. The widest is
    factored first. Its factor replaces it, or is kept beside it if it is needed itself. Solvers damp a
    copy of one Hessian at a time, and ADMM inverts it for each rung of its ladder.
    """
    widths = sorted(widths, reverse=True)
    squares = [4 * width**2 for width in widths]
    held = peak = sum(squares)
    if use.update:
        for square in squares:
            peak = max(peak, held + FACTORING * square)
            held += square * (use.measure_error or use.damped)
    if use.damped and squares:
        held += max(squares[0] * (1 + _inverting(use)), use.solve * _ladder_bytes(widths))
    return max(peak, held)


def _inverting(use: HessianUse) -> int:
    """Matrices of the Hessian's size that ADMM has beside the damped one."""
    return (FACTORING + use.inverses - 1) * use.solve


def _ladder_bytes(widths: list[int]) -> int:
    """Bytes that ADMM takes for a Hessian whose inverses are kept, because several linears read its input.

    A width of one linear alone is not of such an input.
    """
    shared = max((width for width, count in Counter(widths).items() if count > 1), default=0)
    return 4 * shared**2 * (1 + FACTORING + RUNGS)


def block_bytes(blocks: list[Block], use: HessianUse | None) -> int:
    """Peak bytes on the device, of the largest block. Each linear counts with a Hessian of its own, an
    expert's gate and up with one."""
    if use is None:
        return 0
    parts = (part for block in blocks for part in block.in_passes(use.passes))
    return max(peak_bytes(_widths(part, use, on_host=False), use) for part in parts)


def visiting_bytes(use: HessianUse | None) -> int:
    """Bytes on the device for Hessians on the host, one at a time: bands for sums, all of it for a solver."""
    if use is None or not use.on_host:
        return 0
    widest = max(use.on_host)
    solving = 4 * widest**2 * (1 + _inverting(use)) if use.damped else 0
    return max(host_hessian_bytes(widest), solving)


def _widths(block: Block, use: HessianUse, on_host: bool) -> list[int]:
    by_input = {_input_of(linear): linear.in_features for linear in block.linears}
    return [width for width in by_input.values() if (width in use.on_host) is on_host]


def _input_of(linear: Linear) -> object:
    return (linear.module, linear.index) if isinstance(linear, ExpertLinear) else linear


def place_hessians(
    blocks: list[Block],
    device: torch.device,
    where: str,
    use: HessianUse,
    before: list[int] | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Set `use.on_host` and `use.passes`, and refuse a Hessian that does not fit into free memory.

    Args:
        where: "device", "host", or "auto": the widest linears' Hessians move to the host until those of any
            block take at most half of the device's free memory.
        before: what "auto" chose in the run that this one resumes.
        ranks: that do this alike: the first one chooses.
    Raises: `OutOfMemoryError` with the numbers.
    """
    ranks = ranks or Ranks()
    use.inverses = min(ranks.size, AT_ONCE)
    # The ranks of a machine share its memory.
    sharing = len(ranks.local) if device.type == "cpu" else 1
    free = ranks.from_first(lambda: free_memory(device) // sharing)
    if device.type != "cpu":
        again = where == "auto" and before is not None
        use.on_host = frozenset(before) if again else _too_wide(blocks, free, where, use)
    use.passes = _passes(blocks, free, use)
    for place, on_host in ((device, False), (torch.device("cpu"), True)):
        widths = (_widths(block, use, on_host) for block in blocks)
        _require_fit(max(widths, key=lambda widths: peak_bytes(widths, use)), place, use)


def _too_wide(blocks: list[Block], free: int, where: str, use: HessianUse) -> frozenset[int]:
    """The in_features whose Hessians move to the host: all, none, or the widest until the rest fits."""
    if where == "device":
        return frozenset()
    left = replace(use, on_host=frozenset())
    for width in sorted({width for block in blocks for width in _widths(block, left, False)}, reverse=True):
        if where == "host" or block_bytes(blocks, left) > SHARE_OF_DEVICE * free:
            left.on_host |= {width}
    return left.on_host


def _passes(blocks: list[Block], free: int, use: HessianUse) -> int:
    """Passes over a block's inputs: the fewest, a power of two, with room for the Hessians of each."""
    experts = max((each.count for block in blocks for each in block.experts), default=1)
    needed = replace(use)
    while needed.passes < experts and block_bytes(blocks, needed) > SHARE_OF_DEVICE * free:
        needed.passes *= 2
    if needed.passes > 1:
        logger.info("Hessians of the experts are gathered in %d passes over a block's inputs", needed.passes)
    return needed.passes


def _require_fit(widths: list[int], place: torch.device, use: HessianUse) -> None:
    if not widths:
        return
    free, mib = free_memory(place), 2**20
    least = peak_bytes([max(widths)], use)
    if least > free:
        raise OutOfMemoryError(
            f"the Hessian of {max(widths)} inputs takes {least / mib:,.0f} MiB with its factor, and {place} "
            f"has {free / mib:,.0f} MiB free: --ignore those linears, or choose another --hessian_device"
        )
    logger.info("Hessians on %s: at most %.1f MiB at a time", place, peak_bytes(widths, use) / mib)
