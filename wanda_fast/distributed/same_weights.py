"""All ranks of a run must go on with the same weights, bit for bit."""

import torch
from torch import Tensor, nn

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import RanksDifferError

# Narrower integers would be copied to 8 bytes each when they are summed.
WORD = torch.int64


def require_same_weights(name: str, module: nn.Module, ranks: Ranks) -> None:
    """Raise `RanksDifferError` if the ranks' parameters of a block differ."""
    if ranks.size == 1:
        return
    by_sums: dict[tuple, list[int]] = {}
    for rank, sums in enumerate(ranks.gather(checksums(module))):
        by_sums.setdefault(sums, []).append(rank)
    if len(by_sums) > 1:
        groups = " and ".join(", ".join(map(str, same)) for same in by_sums.values())
        raise RanksDifferError(
            f"block {name}: ranks {groups} have different weights; each rank needs the same model and "
            f"hardware without errors"
        )


def checksums(module: nn.Module) -> tuple[int, ...]:
    """A number for each parameter, which differs if a value does or two rows are exchanged."""
    sums = [_checksum(parameter.detach()) for parameter in module.parameters() if parameter.numel()]
    return tuple(torch.stack(sums).tolist()) if sums else ()


def _checksum(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(len(tensor) if tensor.dim() else 1, -1).contiguous().view(torch.uint8)
    rows = rows.view(WORD) if rows.shape[1] % WORD.itemsize == 0 else rows
    by_row = rows.sum(1, dtype=WORD)
    return (by_row * torch.arange(1, len(by_row) + 1, device=by_row.device)).sum()
