"""prune_matrix_: one magnitude threshold for the matrix. Bytes: read to select, read and write to prune."""

from dataclasses import replace

from torch import Tensor

from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Workload, selections
from benchmarks.jobs.published_selection import select

RATIO = 0.5


def published(weight: Tensor, scale: None, rank: int) -> None:
    """A sort of the whole matrix for one threshold. The magnitude baseline of Wanda's published code."""
    weight[select(weight.abs(), str(RATIO), "magnitude")] = 0


def workloads(device: str, quick: bool) -> list[Workload]:
    found = selections(
        "prune_matrix_",
        device,
        quick,
        "50%, magnitude",
        lambda shape: (int(shape[0] * shape[1] * RATIO),),
        None,
    )
    return [replace(workload, n_bytes=workload.n_bytes * 3 // 2) for workload in found]


BENCHMARK = Benchmark("prune_matrix_", workloads, [Provider(PUBLISHED, published)])
