"""The settings of a sweep: lists of methods, patterns and ratios become one setting after the other."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from wanda_fast.errors import OptionError, SparsityRatioError, UnknownMethodError
from wanda_fast.options.all_options import Options
from wanda_fast.pruning.methods import require_method
from wanda_fast.pruning.patterns import NM, parse_pattern
from wanda_fast.pruning.registry import METHODS

DEFAULT_RATIO = 0.5


@dataclass(frozen=True)
class Setting:
    """How one of a sweep's pruned models is made.

    Attributes:
        sparsity_ratio: None: the pattern has its own.
    """

    prune_method: str
    sparsity_type: str
    sparsity_ratio: float | None

    @property
    def name(self) -> str:
        """For example "wanda 2:4", "wanda unstructured 0.5"."""
        ratio = "" if self.sparsity_ratio is None else f" {self.sparsity_ratio}"
        return f"{self.prune_method} {self.sparsity_type}{ratio}"

    def options(self, options: Options) -> Options:
        """Those of the single run with this setting."""
        return replace(
            options,
            prune_method=self.prune_method,
            sparsity_type=self.sparsity_type,
            sparsity_ratio=self.sparsity_ratio,
        )


def settings_of(prune_method: object, sparsity_type: object, sparsity_ratio: object) -> list[Setting]:
    """Every method with every pattern: an N:M pattern once, any other one with each ratio.

    Args:
        prune_method, sparsity_type, sparsity_ratio: a list each, one value, or words between commas; None
            for the ratio: 0.5.
    Raises: `OptionError` for an empty list, or a value that is in one twice; `SparsityRatioError` for a ratio
        that no pattern takes; `UnknownMethodError`, `PatternError`.
    """
    methods, types = _listed("prune_method", prune_method), _listed("sparsity_type", sparsity_type)
    _require_methods(methods)
    ratios = None if sparsity_ratio is None else _ratios(_listed("sparsity_ratio", sparsity_ratio))
    patterns = list(_patterns(types, ratios))
    return [Setting(method, kind, ratio) for method in methods for kind, ratio in patterns]


def _listed(name: str, given: object) -> list:
    if isinstance(given, str):
        given = [word.strip() for word in given.split(",")] if given.strip() else []
    values = list(given) if isinstance(given, Iterable) else [given]
    if not values:
        raise OptionError(f"{name} is an empty list: a sweep needs at least one value of it")
    for value in values:
        if values.count(value) > 1:
            raise OptionError(f"{name} has {value} {values.count(value)} times: name each value once")
    return values


def _require_methods(names: list[str]) -> None:
    known: dict[type, str] = {}
    for name in names:
        require_method(name)
        if METHODS[name].prunes is False:
            raise UnknownMethodError(
                f"prune_method {name} prunes nothing: a sweep measures the dense model in any case"
            )
        if known.setdefault(METHODS[name], name) != name:
            raise OptionError(
                f"prune_method has {known[METHODS[name]]} and {name}, which are the same method"
            )


def _ratios(given: list) -> list[float]:
    ratios = []
    for value in given:
        try:
            ratios.append(float(value))
        except (TypeError, ValueError) as error:
            raise SparsityRatioError(f"sparsity_ratio must be numbers in (0, 1), got {value!r}") from error
        if not 0 < ratios[-1] < 1:
            raise SparsityRatioError(f"sparsity_ratio must be in (0, 1) in a sweep, got {value}")
    return _listed("sparsity_ratio", ratios)


def _patterns(types: list[str], ratios: list[float] | None) -> Iterator[tuple[str, float | None]]:
    fixed = {kind: pattern.ratio for kind in types if isinstance(pattern := parse_pattern(kind), NM)}
    if len(fixed) == len(types):
        _require_own(fixed, ratios or [])
    for kind in types:
        yield from ((kind, ratio) for ratio in ([None] if kind in fixed else ratios or [DEFAULT_RATIO]))


def _require_own(fixed: dict[str, float], ratios: list[float]) -> None:
    """Raise `SparsityRatioError` for a ratio that no N:M pattern implies."""
    for ratio in ratios:
        if not any(abs(ratio - own) < 1e-6 for own in fixed.values()):
            listed = ", ".join(f"{kind} ({own:g})" for kind, own in fixed.items())
            raise SparsityRatioError(
                f"sparsity_ratio {ratio:g} goes with no pattern, since each N:M has a ratio of its own: "
                f"{listed}; add unstructured to sparsity_type, or leave the ratio out"
            )
