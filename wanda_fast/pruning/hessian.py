"""The Hessian of a linear's inputs: solvers, SparseGPT's update and the reconstruction error need it.

Linears that read the same tensor share one Hessian. A block's Hessians are freed before the next block's are
gathered.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import wanda_kernels
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import HessianError, NonFiniteError
from wanda_fast.model.architecture import Block
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.ladder_of_ranks import LadderOfRanks
from wanda_fast.pruning.row_shares import RowShares
from wanda_kernels import Factor, Ladder, NotPositiveDefiniteError

# Rows of a Hessian that one product of the reconstruction error reads.
STRIPE = 4096


@dataclass
class HessianUse:
    """What the Hessians of a run are for.

    Attributes:
        update: the weights that are kept are updated for those that are pruned (SparseGPT).
        refine: sweeps of mask descent.
        polish: steps of conjugate gradients at the end.
        solve: ADMM solves for mask and weights.
        measure_error: the reconstruction error of each linear is measured.
        dampening: share of the mean diagonal that is added to the diagonal.
        on_host: linears of these in_features have their Hessians kept and factored in host memory.
        rounded: by weight name, the dtype to which updated weights are rounded, since the output has it. A
            weight that is absent keeps what the update gave.
        passes: over a block's inputs: each gathers the Hessians of a part of the experts.
        inverses: that ADMM holds at a time of an input that one linear reads.
    """

    update: bool
    measure_error: bool
    dampening: float = 0.01
    on_host: frozenset[int] = frozenset()
    rounded: dict[str, torch.dtype] = field(default_factory=dict)
    passes: int = 1
    inverses: int = 1
    refine: int = 0
    polish: int = 0
    solve: bool = False

    @property
    def damped(self) -> bool:
        """Whether the damped Hessian itself is needed, and not its factor alone."""
        return bool(self.refine or self.polish or self.solve)

    @property
    def changes(self) -> bool:
        """Whether Hessians decide about masks or weights."""
        return self.update or self.damped

    def __post_init__(self):
        if not (self.dampening > 0 and math.isfinite(self.dampening)):
            raise HessianError(f"dampening must be a positive number, got {self.dampening}")

    def hessian(self, linear: Linear) -> "Hessian":
        width, device = linear.in_features, linear.weight.device
        return Hessian(width, device, on_host=width in self.on_host)


class Hessian:
    """acc = sum over tokens of x x^T, fp32 `[in, in]`, and its factor, made once."""

    operation = "add_hessian_"
    sums: str | None = "acc"

    def __init__(self, in_features: int, device: torch.device | str, on_host: bool = False):
        self.in_features = in_features
        where = {"pin_memory": True} if on_host else {"device": device}
        self.acc: Tensor | None = torch.zeros(in_features, in_features, dtype=torch.float32, **where)
        if on_host:
            # It is summed in bands, not with those of other experts.
            self.sums = None
        self.factor: Factor | None = None
        # By whether this rank makes all inverses.
        self._ladders: dict[bool, Ladder] = {}
        # Set by `prepare`: several linears read this input; every input was zero in every token.
        self.is_shared = self.blind = False

    def add(self, x: Tensor) -> None:
        # With `--sequential linear`, tokens can arrive after the Hessian was factored and freed.
        if self.acc is None:
            return
        if self.acc.device == x.device:
            wanda_kernels.add_hessian_(self.acc, x)
        else:
            wanda_kernels.add_hessian_on_host_(self.acc, x)

    def add_experts(self, sums: Tensor, x: Tensor, offsets: Tensor) -> None:
        """Add the tokens of all experts to their Hessians, as `Statistic.add_experts`."""
        wanda_kernels.add_hessian_(sums, x, offsets=offsets)

    def partial_sums(self) -> list[Tensor]:
        """As `Statistic.partial_sums`."""
        return [] if self.acc is None else [self.acc]

    def make_factor(self, use: HessianUse) -> None:
        """Factor the Hessian, once, and free it unless it is needed itself."""
        if self.factor is None:
            self.factor = wanda_kernels.factor_hessian(self.acc, use.dampening)
            if not (use.measure_error or use.damped):
                # An expert's Hessian is a part of one tensor for all experts, whose memory the factors take.
                self.factor = replace(self.factor, upper=self.acc.copy_(self.factor.upper))
                self.acc = None

    def send_factor(self, owner: int, ranks: Ranks, use: HessianUse) -> None:
        """Give the factor that rank `owner` has made to all ranks."""
        if self.factor is None:
            kept = use.measure_error or use.damped
            upper = torch.empty_like(self.acc) if kept else self.acc
            dead = torch.empty(self.in_features, dtype=torch.bool, device=upper.device)
            self.factor = Factor(upper, dead, 0.0)
            self.acc = self.acc if kept else None
        used = torch.tensor(self.factor.dampening, dtype=torch.float64, device=self.factor.dead.device)
        ranks.send_([self.factor.upper, self.factor.dead, used], owner)
        self.factor = replace(self.factor, dampening=used.item())

    def factor_on(self, device: torch.device) -> Factor:
        factor = self.factor
        return Factor(factor.upper.to(device), factor.dead.to(device), factor.dampening)

    def ladder(self, use: HessianUse, device: torch.device, others: Ranks | None = None) -> Ladder:
        """The damped Hessian and its inverses, on the device; made once, until `release`.

        Args:
            others: the ranks that make inverses in turn; None: this one makes all.
        """
        alone = others is None
        if alone not in self._ladders:
            damped = wanda_kernels.damped_hessian(self.acc.to(device), use.dampening)
            made = Ladder(damped, self.is_shared) if alone else LadderOfRanks(damped, self.is_shared, others)
            self._ladders[alone] = made
        return self._ladders[alone]

    def damped(self, use: HessianUse, device: torch.device) -> Tensor:
        made = next(iter(self._ladders.values()), None)
        return (made or self.ladder(use, device)).hessian

    def release(self) -> None:
        """Free what `ladder` made."""
        self._ladders.clear()


def prepare(block: Block, hessians: dict[str, Hessian], use: HessianUse) -> None:
    """Check that a block's Hessians are finite, and find out which are shared, and which are zero.

    Args:
        hessians: by linear name; linears that read the same tensor have the same object.
    Raises: `NonFiniteError`, which names block and linear.
    """
    first = _first_names(block, hessians)
    if any(hessian.in_features in use.on_host for hessian in first):
        # Their last sums may still be on the way to the host.
        torch.cuda.synchronize(block.linears[0].weight.device)
    _require_finite(block, first)
    readers = Counter(hessians.values())
    for hessian in first:
        hessian.is_shared = readers[hessian] > 1
        if hessian.acc is not None:
            hessian.blind = not hessian.acc.diagonal().any()


def factor(
    block: Block, hessians: dict[str, Hessian], use: HessianUse, shares: dict[str, RowShares], ranks: Ranks
) -> None:
    """Factor a block's Hessians if weights are updated, the widest first.

    Of several ranks one makes a factor, and sends it to those that have rows of the weights.

    Raises: `HessianError`, which names block and linear.
    """
    if not use.update:
        return
    first = _first_names(block, hessians)
    new = sorted((x for x in first if x.factor is None), key=lambda hessian: -hessian.in_features)
    # An expert's is needed where the expert is pruned, any other one on all ranks.
    sent = [hessian for hessian in new if not shares[first[hessian]].is_expert]
    owners = {hessian: index % ranks.size for index, hessian in enumerate(sent)}
    for hessian in new:
        if owners.get(hessian, shares[first[hessian]].owner) != ranks.rank:
            continue
        try:
            hessian.make_factor(use)
        except NotPositiveDefiniteError as error:
            raise not_positive_definite(f"block {block.name}: {first[hessian]}", error) from error
    for hessian in sent if ranks.size > 1 else ():
        hessian.send_factor(owners[hessian], ranks, use)


def _first_names(block: Block, hessians: dict[str, Hessian]) -> dict[Hessian, str]:
    """The block's Hessians, each with the name of the first linear that has it."""
    first: dict[Hessian, str] = {}
    for linear in block.linears:
        if linear.name in hessians:
            first.setdefault(hessians[linear.name], linear.name)
    return first


def not_positive_definite(linear: str, error: NotPositiveDefiniteError) -> HessianError:
    return HessianError(f"{linear}: {error}; more calibration tokens or a larger --dampening helps")


def _require_finite(block: Block, hessians: dict[Hessian, str]) -> None:
    """Check the diagonals alone: |H[i, j]| is at most the larger of H[i, i] and H[j, j]."""
    device = block.linears[0].weight.device if block.linears else None
    diagonals = {
        f"{name}: diagonal of the input Hessian": hessian.acc.diagonal().contiguous().to(device)
        for hessian, name in hessians.items()
        if hessian.acc is not None
    }
    try:
        wanda_kernels.require_finite(diagonals)
    except ValueError as error:
        raise NonFiniteError(f"block {block.name}: {error}; this weight was not changed") from error


def reconstruction_error(before: Tensor, after: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """||(before - after) X||^2 and ||before X||^2 of weights `[out, in]`, fp64 scalars on their device.

    Exactly trace(D H D^T) with the undampened H = X X^T: products fp32, sums over stripes fp64.
    """
    before = before.float()
    return _energy(before - after.float(), hessian), _energy(before, hessian)


def _energy(weight: Tensor, hessian: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[1], STRIPE):
        stripe = slice(start, start + STRIPE)
        # H is symmetric, so its rows are its columns.
        product = F.linear(weight, hessian[stripe].to(weight.device))
        total += product.mul_(weight[:, stripe]).sum(dtype=torch.float64)
    return total
