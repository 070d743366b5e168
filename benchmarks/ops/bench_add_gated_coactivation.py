"""add_gated_coactivation_: the statistics of `gated`. FLOP: two matmuls that contract over tokens.

Judged by the gate projection's sum, the harder of the two, which comes first among the operands.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import machine
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Workload
from benchmarks.ops.bench_add_coactivation import of_gated_mlps

# squares rounded to bf16 are off by 2^-8 each; a sum of positive terms is off by no more than a pair
# the interpreter of a rehearsal truncates, which doubles that
TOLERANCES = {torch.bfloat16: 2**-6 if machine.rehearsing() else 2**-7, torch.float32: 1e-4}


def published(acc_gate: Tensor, acc_up: Tensor, gate: Tensor, up: Tensor, x: Tensor, activation: str) -> None:
    """The formulas of docs/gated.md in fp32, as Wanda-CoNNect's published code has its own."""
    gate, up, x = gate.float(), up.float(), x.float().square()
    open_share = torch.sigmoid(gate)
    effect = up * open_share * (1 + gate * (1 - open_share))
    acc_gate += torch.einsum("to,ti->oi", effect.square(), x)
    acc_up += torch.einsum("to,ti->oi", F.silu(gate).square(), x)


def workloads(device: str, quick: bool) -> list[Workload]:
    return of_gated_mlps("add_gated_coactivation_", ("silu",), 2, TOLERANCES, device, quick)


BENCHMARK = Benchmark("add_gated_coactivation_", workloads, [Provider(PUBLISHED, published)])
