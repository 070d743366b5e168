"""A model's blocks and linears, their sparsity, and the N:M patterns that they satisfy."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import wanda_kernels
from wanda_fast.checkpoint import load as checkpoints
from wanda_fast.model.architecture import find_blocks
from wanda_fast.report.contents import Reach
from wanda_fast.run.live_model import require_plain
from wanda_fast.run.validate import reach

COMMON_PATTERNS = ((2, 4), (4, 8), (1, 4), (8, 16), (16, 32))


@dataclass
class LinearFacts:
    """One prunable weight: shape `[out, in]`, dtype, fraction of zeros, and the N:M patterns it satisfies."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    sparsity: float
    patterns: list[str]


@dataclass
class Inspection:
    """A model's class, its blocks' names, its linears, and how many of its weights can be pruned."""

    model: str
    blocks: list[str]
    linears: list[LinearFacts]
    reach: Reach

    @property
    def sparsity(self) -> float:
        weights = [linear.shape[0] * linear.shape[1] for linear in self.linears]
        zeros = (linear.sparsity * count for linear, count in zip(self.linears, weights, strict=True))
        return sum(zeros) / max(sum(weights), 1)


def inspect(model: nn.Module | str, cache_dir: str | None = None) -> Inspection:
    """Inspect a model in memory, or a hub id, folder or GGUF file in the dtype it is stored in."""
    if not isinstance(model, nn.Module):
        model = checkpoints.load(model, cache_dir=cache_dir, device="any").model
    require_plain(model, takes_pixels=True)
    blocks = find_blocks(model)
    linears = [_facts(linear.name, linear.weight.data) for block in blocks for linear in block.linears]
    return Inspection(type(model).__name__, [block.name for block in blocks], linears, reach(model, blocks))


def satisfies(weight: Tensor, n: int, m: int) -> bool:
    """Whether at most n of every m consecutive inputs are non-zero."""
    if weight.shape[1] % m:
        return False
    return bool((weight.reshape(-1, m).count_nonzero(dim=1) <= n).all())


def _facts(name: str, weight: Tensor) -> LinearFacts:
    patterns = [f"{n}:{m}" for n, m in COMMON_PATTERNS if satisfies(weight, n, m)]
    return LinearFacts(name, tuple(weight.shape), weight.dtype, _sparsity(weight), patterns)


def _sparsity(tensor: torch.Tensor) -> float:
    """Fraction of exact zeros."""
    return wanda_kernels.count_zeros(tensor).item() / max(tensor.numel(), 1)
