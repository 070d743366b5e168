"""Where Hessians are kept, and how much memory those of a block take with their factors."""

import logging
from collections.abc import Iterable

import torch

from wanda_fast.architecture import Block
from wanda_fast.errors import OutOfMemoryError, UnknownMethodError
from wanda_fast.hessian import HessianUse
from wanda_fast.memory import free_memory

logger = logging.getLogger(__name__)

ADDING, FACTORING = 2, 2  # matrices beside a Hessian while a batch is added to it, while it is factored
SHARE_OF_DEVICE = 0.5  # of a GPU's free memory; weights, activations and the forward have the rest


def peak_bytes(widths: Iterable[int], use: HessianUse) -> int:
    """Bytes of the Hessians and factors of one block at their highest, in_features of each being `widths`.

    4 in^2 for each Hessian, and as much ADDING times for the widest as a batch comes, FACTORING times as it
    is factored, first of all; then its factor takes its place, or joins it where errors are measured.
    """
    squares = [4 * width**2 for width in sorted(widths, reverse=True)]
    held = sum(squares)
    peak = held + ADDING * max(squares, default=0)
    if use.update:
        for square in squares:
            peak = max(peak, held + FACTORING * square)
            held += square * use.measure_error
    return peak


def place_hessians(blocks: list[Block], device: torch.device, where: str, use: HessianUse) -> None:
    """Decide `use.on_host`, and refuse a Hessian that does not fit into the memory that is free.

    Args:
        where: "device", "host", or "auto": the device, but for the widest linears while the rest of a block's
            could take more than half of its free memory. Each linear counts with a Hessian of its own.
    Raises: `OutOfMemoryError` with the numbers, `UnknownMethodError`.
    """
    if where not in ("auto", "device", "host"):
        raise UnknownMethodError(f"hessian_device must be 'auto', 'device' or 'host', got {where!r}")
    makes = {tuple(linear.module.in_features for linear in block.linears) for block in blocks}
    if device.type != "cpu":
        use.on_host = _on_host(makes, free_memory(device), where, use)
    for place, there in ((device, False), (torch.device("cpu"), True)):
        kept = [[width for width in make if (width in use.on_host) is there] for make in makes]
        _require_fit(max(kept, key=lambda widths: peak_bytes(widths, use)), place, use)


def _on_host(makes: set[tuple], free: int, where: str, use: HessianUse) -> frozenset[int]:
    on_host = set()
    for width in sorted({width for make in makes for width in make}, reverse=True):
        left = [[other for other in make if other not in on_host] for make in makes]
        crowded = max(peak_bytes(widths, use) for widths in left) > SHARE_OF_DEVICE * free
        if where == "host" or (where == "auto" and crowded):
            on_host.add(width)
    return frozenset(on_host)


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
