"""prune_nm_: n kept of every m. Bytes: every weight read and written once, the scale read."""

from torch import Tensor

from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Workload, experts, selections
from benchmarks.jobs.published_selection import lowest_by_topk, select

PATTERNS = ((2, 4), (4, 8), (16, 32))


def published(weight: Tensor, scale: Tensor, n: int, m: int) -> None:
    """A Python loop over groups of m columns, topk in each. Wanda's published code (which counts zeros)."""
    weight[select(weight.abs() * scale.sqrt(), f"{n}:{m}", "wanda", lowest_by_topk)] = 0


def workloads(device: str, quick: bool) -> list[Workload]:
    single = [
        workload
        for n, m in PATTERNS
        for workload in selections(
            "prune_nm_", device, quick, f"{n}:{m}", lambda _, n=n, m=m: (n, m), headline_only=(n, m) != (2, 4)
        )
    ]
    return [*single, experts("prune_nm_", device, quick, "2:4", (2, 4))]


# topk leaves ties open, and a few of millions of random scores are equal
BENCHMARK = Benchmark("prune_nm_", workloads, [Provider(PUBLISHED, published, slack=1e-5)])
