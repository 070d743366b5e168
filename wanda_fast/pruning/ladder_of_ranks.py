"""ADMM's inverses, made by several ranks at a time."""

import torch
from torch import Tensor

from wanda_fast.distributed.ranks import Ranks
from wanda_kernels import RUNGS, Ladder

# Inverses that are made at once, by as many ranks: each is as large as the Hessian.
AT_ONCE = 4


class LadderOfRanks(Ladder):
    """The `Ladder` of a Hessian that all ranks have. They ask for the same rungs at the same time."""

    def __init__(self, hessian: Tensor, keep: bool, ranks: Ranks):
        super().__init__(hessian, keep=True)
        self._ranks, self._keeps = ranks, keep

    def inverse(self, rung: int) -> Tensor:
        if rung not in self._inverses:
            if not self._keeps:
                self._inverses.clear()
            makers = {rung + rank: rank for rank in range(min(self._ranks.size, AT_ONCE, RUNGS - rung))}
            for each, rank in makers.items():
                if rank == self._ranks.rank:
                    super().inverse(each)
            for each, rank in makers.items():
                inverse = self._inverses.setdefault(each, torch.empty_like(self.hessian))
                self._ranks.send_([inverse], rank)
        return self._inverses[rung]
