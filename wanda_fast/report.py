"""What a run did: sparsity and seconds per linear, perplexities with their protocol, the recipe."""

import json
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata


@dataclass
class Reach:
    """How much of a model the pruner can touch, in numbers of weights."""

    prunable: int
    blocks: int
    model: int
    largest_out_of_reach: str | None  # name of the largest weight in a block that is no prunable linear


@dataclass
class LinearReport:
    """One pruned weight: fraction of exact zeros, seconds of selection, who selected, what was gathered."""

    sparsity: float
    weights: int
    seconds: float
    operation: str  # of wanda_kernels, or "select" of a pattern of the user's
    backend: str
    statistic: str | None  # operation that gathered the statistic
    statistic_backend: str | None
    further: dict[str, str] = field(default_factory=dict)  # other operations -> their backends
    error: float | None = None  # ||(W - W') X||^2 over the calibration tokens; None: not measured
    relative_error: float | None = None  # of ||W X||^2
    dampening: float | None = None  # of the Hessian whose factor updated the weight
    fallback: str | None = None  # the method that pruned it where no input was ever other than zero


@dataclass
class Report:
    """The outcome of `wanda_fast.prune`. `linears` is keyed by the linear's full name in the model."""

    recipe: dict
    linears: dict[str, LinearReport] = field(default_factory=dict)
    reach: Reach | None = None
    calibration: dict = field(default_factory=dict)  # nsamples, seqlen, digest
    perplexity: dict = field(default_factory=dict)  # protocol, dense, pruned
    zero_shot: dict = field(default_factory=dict)  # task -> results
    seconds: dict[str, float] = field(default_factory=dict)  # phase -> seconds
    resources: dict = field(default_factory=dict)  # batch_size, activations, why
    predicted_memory: dict[str, int] = field(default_factory=dict)  # device -> bytes above Python and torch
    peak_memory: dict[str, int] = field(default_factory=dict)  # device -> bytes
    warnings: list[str] = field(default_factory=list)
    digests: dict[str, str | None] = field(default_factory=dict)  # of model and tokens; none of a live model
    complete: bool = False  # all that was asked for is measured and written

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the prunable weights."""
        weights = sum(linear.weights for linear in self.linears.values())
        return sum(linear.sparsity * linear.weights for linear in self.linears.values()) / max(weights, 1)

    @property
    def backends(self) -> dict[str, str]:
        """Operation -> the backend that it ran on."""
        used = {linear.operation: linear.backend for linear in self.linears.values()}
        used |= {x.statistic: x.statistic_backend for x in self.linears.values() if x.statistic}
        for linear in self.linears.values():
            used |= linear.further
        return dict(sorted(used.items()))

    def block_sparsity(self) -> dict[str, float]:
        """Sparsity of each block, by its name."""
        zeros: dict[str, list[float]] = {}
        for name, linear in self.linears.items():
            counts = zeros.setdefault(block_name(name), [0.0, 0])
            counts[0] += linear.sparsity * linear.weights
            counts[1] += linear.weights
        return {name: pruned / weights for name, (pruned, weights) in zeros.items()}

    def block_error(self) -> dict[str, float]:
        """Mean relative reconstruction error of each block's linears, by its name, where measured."""
        errors: dict[str, list[float]] = {}
        for name, linear in self.linears.items():
            if linear.relative_error is not None:
                errors.setdefault(block_name(name), []).append(linear.relative_error)
        return {name: sum(found) / len(found) for name, found in errors.items()}

    def to_json(self) -> str:
        content = asdict(self) | {
            "sparsity": self.sparsity,
            "block_sparsity": self.block_sparsity(),
            "block_error": self.block_error(),
            "versions": versions(),
        }
        return json.dumps(content, indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """What `to_json` wrote, but for versions."""
        content = json.loads(text)
        report = cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})
        report.linears = {name: LinearReport(**linear) for name, linear in report.linears.items()}
        report.reach = report.reach and Reach(**report.reach)
        return report

    def published_log(self) -> str:
        """The published code's `log_METHOD.txt`: method, sparsity, perplexity, tab-separated."""
        pruned = self.perplexity.get("pruned")
        value = "-" if pruned is None else f"{pruned:.4f}"
        lines = [
            "method\tactual_sparsity\tppl_test",
            f"{self.recipe['prune_method']}\t{self.sparsity:.4f}\t{value}",
        ]
        lines += [f"{task}\t{results}" for task, results in self.zero_shot.items()]
        return "\n".join(lines) + "\n"


def update_warnings(linears: dict[str, LinearReport], dampening: float) -> list[str]:
    """A sentence for each way in which Hessians were not what was asked for; `dampening` was."""
    found: dict[str, list[str]] = {}
    for name, linear in linears.items():
        if linear.fallback is not None:
            what = f"saw no calibration token, or zeros alone, and fell back to {linear.fallback}"
            found.setdefault(what, []).append(name)
        elif linear.dampening is not None and linear.dampening > dampening:
            what = f"had a Hessian that is not positive definite at a dampening of {dampening:g}"
            found.setdefault(f"{what}; factored with {linear.dampening:g}", []).append(name)
    return [f"{_listed(names)} {what}" for what, names in found.items()]


def _listed(names: list[str], most: int = 4) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more linears"


def block_name(linear: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3`: up to the first number."""
    parts = linear.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else linear


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in ("wanda_fast", "torch", "triton", "transformers", "datasets", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
