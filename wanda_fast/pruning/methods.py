"""How weights are chosen: magnitude, wanda, connect, gated, sparsegpt, admm, and methods of a user's own."""

from collections.abc import Callable

from torch import Tensor

import wanda_kernels
from wanda_fast.errors import OptionError, PatternError, ScoreError, UnknownMethodError
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.coactivation import Coactivation, GatedCoactivation
from wanda_fast.pruning.hessian import Hessian, HessianUse
from wanda_fast.pruning.patterns import NM, Pattern, empty_mask
from wanda_fast.pruning.registry import METHODS, register_method
from wanda_fast.pruning.statistics import SquaredNorm, Statistic

SumRows = Callable[[Tensor], Tensor]


class Method:
    """A way to rank weights. To add one, subclass, define `score`, and register it by name.

    `score(weight, acc)` gets a linear's weight `[out, in]` and the sum that its statistic gathered over the
    calibration tokens: by default that of the squared inputs, fp32 `[in]`. It returns importances
    `[out, in]`. A method with a statistic of its own also defines `statistic`.

    Attributes:
        options: command-line options that `__init__` takes.
        uses_activations: whether there is a statistic; if not, `acc` is None.
        updates: whether the weights that stay are always updated; for other methods `--update obs` says so.
        solves: whether mask and weights are solved for together (ADMM), in place of mask and update.
        takes_variant: whether `--use_variant` means something to it.
        prunes: False for a run that only loads, evaluates and saves.
        wants_gated_mlp: whether it differs from wanda only in gated MLPs.
        hessians: what the run's Hessians are for; None: it has none. Set by `make_method`.
    """

    name = "method"
    options: tuple[str, ...] = ()
    uses_activations = True
    updates = solves = False
    takes_variant = True
    prunes = True
    wants_gated_mlp = False
    score = None
    hessians: HessianUse | None = None

    @property
    def calibrates(self) -> bool:
        """Whether calibration tokens are needed."""
        return self.uses_activations or self.hessians is not None

    @property
    def make_hessian(self) -> Callable[[Linear], Hessian] | None:
        return None if self.hessians is None else self.hessians.hessian

    def check(self, pattern: Pattern) -> None:
        """Raise `PatternError` if the method, or mask descent after it, cannot prune by this pattern."""
        if self.hessians is not None and self.hessians.refine:
            if pattern.rule is None:
                raise PatternError(
                    f"--refine exchanges weights of a row or of an N:M group, not of {pattern}"
                )
            require_rows(f"--refine {self.hessians.refine}", pattern)

    def statistic(self, linear: Linear) -> Statistic | None:
        """A new statistic for this linear; None if its score needs none."""
        return SquaredNorm(linear) if self.uses_activations else None

    def prune_(
        self, weight: Tensor, scale: Tensor | None, pattern: Pattern, mask: Tensor | None = None
    ) -> str:
        """Prune one weight in place. Returns the name of the operation that did it."""
        if self.score is not None:
            return pattern.prune_by_score_(weight, self._checked_score(weight, scale), mask)
        return pattern.prune_(weight, scale, mask=mask)

    def _checked_score(self, weight: Tensor, acc: Tensor | None) -> Tensor:
        scores = self.score(weight, acc).float()
        if scores.shape != weight.shape or scores.isnan().any():
            got = "NaN" if scores.shape == weight.shape else f"a score of shape {list(scores.shape)}"
            raise ScoreError(
                f"method {self.name!r} gave {got} for a weight {list(weight.shape)}: score must return one "
                f"number for each weight"
            )
        return scores

    def prune_and_update_(
        self,
        weight: Tensor,
        scale: Tensor | None,
        pattern: Pattern,
        factor: wanda_kernels.Factor,
        mask: Tensor | None = None,
        sum_rows: SumRows | None = None,
    ) -> str:
        """Prune the weights that `prune_` would, and update the others for their error (SparseGPT).

        Args:
            sum_rows: as `wanda_kernels.sparsegpt_` takes it, if other ranks have rows of the weight.
        """
        operation, pruned = self.choose(weight, scale, pattern, factor)
        wanda_kernels.sparsegpt_(weight, factor, None, pruned=pruned, mask=mask, check_finite=False)
        return operation

    def choose(
        self,
        weight: Tensor,
        scale: Tensor | None,
        pattern: Pattern,
        factor: wanda_kernels.Factor | None,
        sum_rows: SumRows | None = None,
    ) -> tuple[str, Tensor]:
        """What the method prunes, bool `[out, in]`, with the operation's name. The weight does not change."""
        bits = empty_mask(weight)
        operation = self.prune_(weight.clone(), scale, pattern, bits)
        return operation, ~wanda_kernels.unpack_bits(bits, weight.shape[1])


@register_method("magnitude")
class Magnitude(Method):
    """abs(W); unstructured has one threshold for the matrix (Han et al. 2015, as Wanda's baseline)."""

    uses_activations = takes_variant = False

    def prune_(
        self, weight: Tensor, scale: Tensor | None, pattern: Pattern, mask: Tensor | None = None
    ) -> str:
        return pattern.prune_(weight, None, whole_matrix=True, mask=mask)


@register_method("wanda")
class Wanda(Method):
    """abs(W) * the input's L2 norm (Sun et al. 2023, arXiv 2306.11695)."""


@register_method("connect", "wanda_connect")
class Connect(Method):
    """Wanda, but a gated MLP's up_proj is scored by how its input and gate co-activate (Wanda-CoNNect)."""

    options = ("connect_gate",)
    wants_gated_mlp = True

    def __init__(self, connect_gate: str = "activated"):
        self.activated = connect_gate == "activated"

    def statistic(self, linear: Linear) -> Statistic:
        has_up = linear.part in ("up", "both")
        return Coactivation(linear, self.activated) if has_up else SquaredNorm(linear)


@register_method("gated")
class Gated(Method):
    """Wanda, but a gated MLP's gate and up projection are scored by the change of act(gate) * up if a weight
    is removed, to first order (this project's; derived in docs/gated.md).
    """

    wants_gated_mlp = True

    def statistic(self, linear: Linear) -> Statistic:
        return SquaredNorm(linear) if linear.gated is None else GatedCoactivation(linear)


@register_method("ablate_mag_seq")
class MagnitudeThenUpdate(Magnitude):
    """Magnitude's masks and SparseGPT's update: an ablation of Wanda's."""

    updates = True


@register_method("ablate_wanda_seq")
class WandaThenUpdate(Wanda):
    """Wanda's masks and SparseGPT's update: an ablation of Wanda's."""

    updates = True


@register_method("sparsegpt")
class SparseGPT(Method):
    """W^2 / U_jj^2, chosen as the update reaches a column (Frantar & Alistarh 2023, arXiv 2301.00774)."""

    uses_activations = takes_variant = False
    updates = True
    selector = "obs"

    def check(self, pattern: Pattern) -> None:
        _require_rule(self, pattern)

    def prune_and_update_(
        self,
        weight: Tensor,
        scale: Tensor | None,
        pattern: Pattern,
        factor: wanda_kernels.Factor,
        mask: Tensor | None = None,
        sum_rows: SumRows | None = None,
    ) -> str:
        wanda_kernels.sparsegpt_(
            weight,
            factor,
            pattern.rule,
            selector=self.selector,
            scale=scale,
            mask=mask,
            check_finite=False,
            sum_rows=sum_rows,
        )
        return "sparsegpt_"

    def choose(
        self,
        weight: Tensor,
        scale: Tensor | None,
        pattern: Pattern,
        factor: wanda_kernels.Factor | None,
        sum_rows: SumRows | None = None,
    ) -> tuple[str, Tensor]:
        bits = empty_mask(weight)
        operation = self.prune_and_update_(weight.clone(), scale, pattern, factor, bits, sum_rows)
        return operation, ~wanda_kernels.unpack_bits(bits, weight.shape[1])


@register_method("ablate_mag_iter")
class MagnitudeInUpdate(SparseGPT):
    """SparseGPT with abs(W) of the updated weights as its score: an ablation of Wanda's."""

    selector = "magnitude"


@register_method("ablate_wanda_iter")
class WandaInUpdate(SparseGPT):
    """SparseGPT with Wanda's score of the updated weights: an ablation of Wanda's."""

    uses_activations = True
    selector = "wanda"


@register_method("admm")
class ADMM(Method):
    """Mask and weights of the lowest layer error (ALPS, arXiv 2406.07831; Boza, arXiv 2401.02938)."""

    uses_activations = takes_variant = False
    solves = True

    def check(self, pattern: Pattern) -> None:
        _require_rule(self, pattern)


@register_method("dense")
class Dense(Method):
    """Nothing is pruned; the run loads, evaluates and saves."""

    uses_activations = takes_variant = prunes = False


def prunes_by_rows(method: Method, pattern: Pattern) -> bool:
    """Whether every row of a weight is pruned by itself, or by thresholds that ranks find together."""
    plain = method.score is None and type(method).prune_ in (Method.prune_, Magnitude.prune_)
    plain &= type(method).prune_and_update_ in (Method.prune_and_update_, SparseGPT.prune_and_update_)
    plain &= type(method).choose in (Method.choose, SparseGPT.choose)
    granularity = pattern.granularity
    by_matrix = granularity is None and isinstance(method, Magnitude) and not isinstance(pattern, NM)
    whole_matrix = pattern.is_variant or granularity == "layer" or by_matrix
    return plain and pattern.rule is not None and not whole_matrix


def _require_rule(method: Method, pattern: Pattern) -> None:
    require_rows(method.name, pattern)
    if pattern.rule is None:
        raise PatternError(
            f"{method.name} chooses unstructured or N:M as it updates, not {pattern}: "
            f"other methods take that pattern, with --update obs too"
        )


def require_rows(what: str, pattern: Pattern) -> None:
    """Raise `PatternError` if `--prune_granularity` was given with `what`, which does not take it."""
    if pattern.granularity is not None:
        raise PatternError(
            f"{what} chooses by its own rule, so it takes no prune_granularity {pattern.granularity}"
        )


def require_method(name: str) -> None:
    """Raise `UnknownMethodError` unless a method of that name is registered."""
    if name not in METHODS:
        raise UnknownMethodError(f"unknown prune_method {name!r}: choose {', '.join(METHODS)}")


def make_method(
    name: str,
    update: str = "none",
    dampening: float = 0.01,
    measure_error: bool | None = None,
    refine: int = 0,
    polish: int | None = None,
    **options: object,
) -> Method:
    """The registered method of that name, made with those of `options` that it takes.

    Args:
        update: "obs": the weights that the method keeps are updated for those that it prunes; "none": only
            if the method always does that.
        measure_error: measure each linear's reconstruction error; None: if Hessians are gathered anyway.
        refine: sweeps of mask descent.
        polish: steps of conjugate gradients; None: as the method has them.
    Raises: `UnknownMethodError`, `HessianError`, `OptionError`.
    """
    require_method(name)
    cls = METHODS[name]
    method = cls(**{option: options[option] for option in cls.options})
    if method.solves and (update == "obs" or refine):
        flag = f"--refine {refine}" if refine else "--update obs"
        raise OptionError(f"{name} solves for mask and weights together, so it takes no {flag}")
    if polish is None:
        polish = wanda_kernels.POLISH_STEPS if method.solves else 0
    use = HessianUse(
        method.updates or update == "obs",
        bool(measure_error),
        dampening,
        refine=refine,
        polish=polish,
        solve=method.solves,
    )
    if measure_error is None:
        use.measure_error = use.changes
    if (use.changes or use.measure_error) and method.prunes:
        method.hessians = use
    return method
