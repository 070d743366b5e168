"""prune_nm_: n kept of every m. Bytes: every weight read and written once, the scale read."""

import torch
from torch import Tensor

from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Workload, selections

PATTERNS = ((2, 4), (4, 8), (16, 32))


def published(weight: Tensor, scale: Tensor, n: int, m: int) -> None:
    """A Python loop over groups of m columns, topk in each. Wanda's published code (which counts zeros)."""
    scores = weight.abs() * scale.sqrt()
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for first in range(0, scores.shape[1], m):
        group = scores[:, first : first + m].float()
        lowest = torch.topk(group, m - n, dim=1, largest=False)[1]
        mask.scatter_(1, first + lowest, True)
    weight[mask] = 0


def workloads(device: str, quick: bool) -> list[Workload]:
    return [
        workload
        for n, m in PATTERNS
        for workload in selections(
            "prune_nm_", device, quick, f"{n}:{m}", lambda _, n=n, m=m: (n, m), headline_only=(n, m) != (2, 4)
        )
    ]


# topk leaves it open which of equal scores goes; a few among millions of random ones are equal
BENCHMARK = Benchmark("prune_nm_", workloads, [Provider(PUBLISHED, published, slack=1e-5)])
