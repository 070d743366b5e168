"""Which weights are pruned, given their scores: unstructured, N:M, and patterns that users register."""

import inspect
import re
from copy import copy

import torch
from torch import Tensor

import wanda_kernels
from wanda_fast.errors import MaskError, PatternError, SparsityRatioError
from wanda_fast.pruning.registry import PATTERNS, register_pattern


def empty_mask(weight: Tensor) -> Tensor:
    """An uninitialised packed mask for `weight` `[..., in]`: uint8 `[..., ceil(in / 8)]` on its device."""
    shape = (*weight.shape[:-1], -(-weight.shape[-1] // 8))
    return torch.empty(shape, dtype=torch.uint8, device=weight.device)


class Pattern:
    """A sparsity pattern. To add one, subclass, define `select`, and register it by name.

    Attributes:
        ratio: the fraction of weights to prune, in [0, 1).
    """

    name = "pattern"
    # What `sparsegpt_` takes: a ratio or "n:m". None: `select` alone can choose.
    rule: float | str | None = None
    # Whether this is what `--use_variant` asks for.
    is_variant = False
    # What `--prune_granularity` asks for.
    granularity: str | None = None

    def __init__(self, ratio: float | None = None):
        self.ratio = 0.5 if ratio is None else ratio
        if not 0 <= self.ratio < 1:
            raise SparsityRatioError(f"sparsity_ratio must be in [0, 1), got {self.ratio}")

    def __str__(self) -> str:
        return self.name

    def with_ratio(self, ratio: float) -> "Pattern":
        """The same pattern with another ratio."""
        changed = copy(self)
        changed.ratio = ratio
        return changed

    def check(self, linear: str, in_features: int) -> None:
        """Raise `PatternError` if a linear of that width cannot have the pattern."""

    def select(self, scores: Tensor) -> Tensor:
        """scores fp32 `[out, in]` -> bool `[out, in]`, True where the weight is to be pruned."""
        raise NotImplementedError

    def prune_(
        self, weight: Tensor, scale: Tensor | None, *, whole_matrix: bool = False, mask: Tensor | None = None
    ) -> str:
        """Zero the weights with the lowest scores, abs(W) * sqrt(scale), in place.

        This default calls `select`; the built-in patterns use fused kernels.

        Args:
            weight: `[out, in]`; where rows are pruned each by itself, also `[experts, out, in]`.
            scale: fp32 `[in]` or `[out, in]`, behind `[experts]` if the weight is; None: the score is abs(W).
            whole_matrix: one threshold for the matrix instead of one for each row (published magnitude). A
                pattern without thresholds ignores it.
            mask: receives the packed mask (`wanda_kernels.pack_bits`).
        Returns: the name of the operation that pruned.
        """
        magnitude = weight.float().abs()
        scores = magnitude if scale is None else magnitude * scale.sqrt()
        return self.prune_by_score_(weight, scores, mask)

    def count_violations(self, weight: Tensor) -> int:
        """How many groups of `weight` `[out, in]` hold more non-zero weights than the pattern allows.

        Raises: `MaskError` for a pattern without groups.
        """
        raise MaskError(f"only N:M patterns can be verified, got {self}")

    def prune_by_score_(self, weight: Tensor, scores: Tensor, mask: Tensor | None = None) -> str:
        pruned = self.select(scores)
        weight.masked_fill_(pruned, 0.0)
        if mask is not None:
            mask.copy_(wanda_kernels.pack_bits(~pruned))
        return "select"


@register_pattern("unstructured")
class Unstructured(Pattern):
    """Exactly int(in_features * ratio) weights of each row are pruned.

    Attributes:
        granularity: "row", or "layer": one threshold for the matrix, and ties of it are pruned too. None: as
            the method has it.
    """

    @property
    def rule(self) -> float:
        return self.ratio

    def num_pruned(self, in_features: int) -> int:
        return int(in_features * self.ratio)

    def select(self, scores: Tensor) -> Tensor:
        if self.granularity == "layer":
            rank = int(scores.numel() * self.ratio)
            return scores <= scores.flatten().sort().values[rank]
        lowest = scores.sort(dim=1, stable=True).indices[:, : self.num_pruned(scores.shape[1])]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)

    def prune_(
        self, weight: Tensor, scale: Tensor | None, *, whole_matrix: bool = False, mask: Tensor | None = None
    ) -> str:
        if self.granularity == "layer" or (whole_matrix and self.granularity is None):
            rank = int(weight.numel() * self.ratio)
            wanda_kernels.prune_matrix_(weight, scale, rank, mask=mask, check_finite=False)
            return "prune_matrix_"
        wanda_kernels.prune_rows_(
            weight, scale, self.num_pruned(weight.shape[-1]), mask=mask, check_finite=False
        )
        return "prune_rows_"


class Variant(Unstructured):
    """The Wanda variant: a row's scores say how many of its weights are pruned; the matrix has the ratio."""

    is_variant = True

    def prune_(
        self, weight: Tensor, scale: Tensor | None, *, whole_matrix: bool = False, mask: Tensor | None = None
    ) -> str:
        # Magnitude has no variant.
        if whole_matrix:
            return super().prune_(weight, scale, whole_matrix=True, mask=mask)
        wanda_kernels.prune_variant_(weight, scale, self.ratio, mask=mask, check_finite=False)
        return "prune_variant_"


class NM(Pattern):
    """N kept of every M consecutive inputs; the ratio follows: 1 - N/M."""

    def __init__(self, n: int, m: int, ratio: float | None = None):
        if not 1 <= n < m <= 32:
            raise PatternError(f"sparsity_type {n}:{m} needs 1 <= N < M <= 32 (N kept of every M)")
        implied = 1 - n / m
        if ratio is not None and not abs(ratio - implied) <= 1e-6:  # NaN too
            raise SparsityRatioError(
                f"sparsity_type {n}:{m} keeps {n} of {m}, a ratio of {implied:g}; "
                f"sparsity_ratio {ratio:g} is at odds with it"
            )
        super().__init__(implied)
        self.n, self.m = n, m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def rule(self) -> str:
        return str(self)

    def check(self, linear: str, in_features: int) -> None:
        if in_features % self.m:
            raise PatternError(
                f"{linear} has in_features = {in_features}, not a multiple of {self.m} (pattern {self})"
            )

    def count_violations(self, weight: Tensor) -> int:
        groups = weight.reshape(-1, self.m).count_nonzero(dim=1)
        return int((groups > self.n).sum())

    def select(self, scores: Tensor) -> Tensor:
        groups = scores.reshape(-1, self.m)
        lowest = groups.sort(dim=1, stable=True).indices[:, : self.m - self.n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).view(scores.shape)

    def prune_(
        self, weight: Tensor, scale: Tensor | None, *, whole_matrix: bool = False, mask: Tensor | None = None
    ) -> str:
        wanda_kernels.prune_nm_(weight, scale, self.n, self.m, mask=mask, check_finite=False)
        return "prune_nm_"


def parse_pattern(
    sparsity_type: str,
    ratio: float | None = None,
    use_variant: bool = False,
    granularity: str | None = None,
) -> Pattern:
    """ "unstructured", "N:M", or a registered name with whole numbers after colons ("block:16").

    Args:
        granularity: of "unstructured" alone.
    Raises: `PatternError`, `SparsityRatioError`.
    """
    pattern = _parsed(sparsity_type, ratio, use_variant)
    if granularity is not None:
        if type(pattern) is not Unstructured:
            raise PatternError(
                f"prune_granularity {granularity} is for unstructured sparsity without --use_variant, "
                f"not for {sparsity_type}{' with --use_variant' if use_variant else ''}"
            )
        pattern.granularity = granularity
    return pattern


def _parsed(sparsity_type: str, ratio: float | None, use_variant: bool) -> Pattern:
    if re.fullmatch(r"\d+:\d+", sparsity_type):
        n, m = map(int, sparsity_type.split(":"))
        return NM(n, m, ratio)
    name, *numbers = sparsity_type.split(":")
    if name not in PATTERNS or not all(number.isdecimal() for number in numbers):
        known = ", ".join(PATTERNS)
        raise PatternError(f"unknown sparsity_type {sparsity_type!r}: choose N:M (N kept of M) or {known}")
    cls = Variant if use_variant and name == "unstructured" else PATTERNS[name]
    try:
        return cls(*map(int, numbers), ratio=ratio)
    except TypeError as error:
        wanted = [name for name in inspect.signature(cls).parameters if name != "ratio"]
        takes = f"takes {', '.join(wanted)} after colons" if wanted else "takes no numbers"
        raise PatternError(f"sparsity_type {sparsity_type!r}: {name} {takes}") from error
