"""How weights are ranked: magnitude, wanda, connect, gated, and what users register."""

from torch import Tensor

from wanda_fast.architecture import Linear
from wanda_fast.coactivation import Coactivation, GatedCoactivation
from wanda_fast.errors import UnknownMethodError
from wanda_fast.patterns import Pattern
from wanda_fast.registry import METHODS, register_method
from wanda_fast.sq_norm import SquaredNorm
from wanda_fast.statistics import Statistic


class Method:
    """A way to rank weights. To add one, subclass, define `score`, and register it by name.

    `score(weight, sq_norm)` gets a linear's weight `[out, in]` and the sum over calibration tokens of its
    squared inputs, fp32 `[in]` (None where `uses_activations` is False), and returns importances `[out, in]`.
    """

    name = "method"
    options: tuple[str, ...] = ()  # command-line options that __init__ takes
    uses_activations = True
    score = None

    def statistic(self, linear: Linear) -> Statistic | None:
        """What to gather from this linear's calibration inputs; None for nothing."""
        return SquaredNorm(linear) if self.uses_activations else None

    def prune_(
        self, weight: Tensor, scale: Tensor | None, pattern: Pattern, mask: Tensor | None = None
    ) -> str:
        """Prune one weight in place; returns the operation that did it."""
        if self.score is not None:
            return pattern.prune_by_score_(weight, self.score(weight, scale).float(), mask)
        return pattern.prune_(weight, scale, mask=mask)


@register_method("magnitude")
class Magnitude(Method):
    """abs(W); unstructured is one threshold a matrix (Han et al. 2015, as in Wanda's baseline)."""

    uses_activations = False

    def prune_(
        self, weight: Tensor, scale: Tensor | None, pattern: Pattern, mask: Tensor | None = None
    ) -> str:
        return pattern.prune_(weight, None, whole_matrix=True, mask=mask)


@register_method("wanda")
class Wanda(Method):
    """abs(W) * the input's L2 norm (Sun et al. 2023, arXiv 2306.11695)."""


@register_method("connect", "wanda_connect")
class Connect(Method):
    """Wanda, but a gated MLP's up_proj by how input and gate channels co-activate (Wanda-CoNNect)."""

    options = ("connect_gate",)

    def __init__(self, connect_gate: str = "activated"):
        if connect_gate not in ("activated", "raw"):
            raise UnknownMethodError(f"connect_gate must be 'activated' or 'raw', got {connect_gate!r}")
        self.activated = connect_gate == "activated"

    def statistic(self, linear: Linear) -> Statistic:
        is_up = linear.gated is not None and linear.module is linear.gated.up
        return Coactivation(linear, self.activated) if is_up else SquaredNorm(linear)


@register_method("gated")
class Gated(Method):
    """Wanda, but a gated MLP's gate and up projection by what removing a weight does to act(gate) * up, to
    first order (this project's; derived in docs/gated.md).
    """

    def statistic(self, linear: Linear) -> Statistic:
        return SquaredNorm(linear) if linear.gated is None else GatedCoactivation(linear)


@register_method("dense")
class Dense(Method):
    """Nothing is pruned; the run loads, evaluates and saves."""

    uses_activations = False

    def prune_(
        self, weight: Tensor, scale: Tensor | None, pattern: Pattern, mask: Tensor | None = None
    ) -> str:
        return "none"


def make_method(name: str, **options: object) -> Method:
    """The registered method of that name, given those of `options` that it takes."""
    if name not in METHODS:
        raise UnknownMethodError(f"unknown prune_method {name!r}: choose {', '.join(METHODS)}")
    cls = METHODS[name]
    return cls(**{option: options[option] for option in cls.options})
