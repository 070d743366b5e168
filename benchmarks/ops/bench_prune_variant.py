"""prune_variant_: Wanda's variant at one half. Bytes: one read and one write, however many alphas."""

import torch
from torch import Tensor

from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Workload, selections

RATIO = 0.5


def published(weight: Tensor, scale: Tensor, ratio: float) -> None:
    """A sort and a running sum of every row, alpha bisected on the host. Wanda's published code."""
    scores = weight.abs() * scale.sqrt()
    ascending = torch.sort(scores, dim=-1, stable=True)[0]
    running, total = torch.cumsum(ascending, dim=1), scores.sum(dim=1, keepdim=True)

    def mask_at(alpha: float) -> Tensor:
        count = (running <= total * alpha).sum(dim=1, keepdim=True)
        return scores <= torch.gather(ascending, 1, (count - 1).clamp(min=0))

    low, alpha, high = 0.0, 0.4, 0.8
    mask = mask_at(alpha)
    sparsity = mask.sum() / mask.numel()
    while torch.abs(sparsity - ratio) > 0.001 and high - low >= 0.001:
        if sparsity > ratio:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        mask = mask_at(alpha)
        sparsity = mask.sum() / mask.numel()
    weight[mask] = 0


def workloads(device: str, quick: bool) -> list[Workload]:
    return selections("prune_variant_", device, quick, "50%", lambda _: (RATIO,))


# its fp32 running sums round, the reference's integers do not: a row may end a weight or two off
BENCHMARK = Benchmark("prune_variant_", workloads, [Provider(PUBLISHED, published, slack=2e-3)])
