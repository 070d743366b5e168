"""prune_rows_: half of each row goes. Bytes: every weight read and written once, the scale read."""

from torch import Tensor

from benchmarks.core import shapes
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Workload, experts, selections
from benchmarks.jobs.published_selection import select

RATIO = 0.5


def published(weight: Tensor, scale: Tensor, num_pruned: int) -> None:
    """A stable sort of every row, its first columns scattered into a mask. Wanda's published code."""
    weight[select(weight.abs() * scale.sqrt(), str(RATIO), "wanda")] = 0


def workloads(device: str, quick: bool) -> list[Workload]:
    def num_pruned(shape):
        return (int(shape[-1] * RATIO),)

    vector = selections("prune_rows_", device, quick, "50%", num_pruned)
    matrix = selections(
        "prune_rows_", device, quick, "50%, scale a matrix", num_pruned, "matrix", headline_only=True
    )
    shape = shapes.QUICK_EXPERTS if quick else shapes.EXPERTS
    return [*vector, *matrix, experts("prune_rows_", device, quick, "50%", num_pruned(shape))]


BENCHMARK = Benchmark("prune_rows_", workloads, [Provider(PUBLISHED, published)])
