"""The report of a run: sparsity and seconds per linear, perplexities with their protocol, the recipe."""

import json
from dataclasses import asdict, dataclass, field, fields
from statistics import median

from wanda_fast.report.task_results import in_words
from wanda_fast.report.versions import versions

# An expert is starved if it saw fewer calibration tokens.
STARVED_TOKENS = 256


@dataclass
class Reach:
    """How much of a model can be pruned, in numbers of weights.

    Attributes:
        prunable: in prunable linears.
        blocks: in all matrices of the blocks (parameters with two or more dimensions).
        model: in all parameters.
        largest_out_of_reach: name of the largest matrix in the blocks that is not prunable.
    """

    prunable: int
    blocks: int
    model: int
    largest_out_of_reach: str | None


@dataclass
class LinearReport:
    """One pruned weight.

    Attributes:
        sparsity: fraction of exact zeros.
        weights: number of weights.
        seconds: of the selection.
        operation: the operation of wanda_kernels that pruned it, or "select" of a user's pattern.
        backend: that it ran on.
        statistic: the operation that gathered the statistic, and the backend that it ran on.
        further: other operations, each with its backend.
        error: ||(W - W') X||^2 over the calibration tokens; relative_error: its ratio to ||W X||^2. None: not
            measured.
        dampening: of the Hessian that updated the weight.
        iterations: of ADMM.
        fallback: the method that pruned it because its statistic was zero.
        tokens: calibration tokens that its expert saw; None: it is no expert's.
    """

    sparsity: float
    weights: int
    seconds: float
    operation: str
    backend: str
    statistic: str | None
    statistic_backend: str | None
    further: dict[str, str] = field(default_factory=dict)
    error: float | None = None
    relative_error: float | None = None
    dampening: float | None = None
    fallback: str | None = None
    tokens: int | None = None
    iterations: int | None = None


@dataclass
class RankReport:
    """What one of several ranks took.

    Attributes:
        host: name of its machine.
        seconds: by phase; "collectives" are those in which it exchanged data or waited for other ranks.
        peak_memory: bytes by device.
        moved: bytes of the tensors that it took part in summing or sending.
    """

    host: str
    seconds: dict[str, float]
    peak_memory: dict[str, int]
    moved: int


@dataclass
class Report:
    """The outcome of `wanda_fast.prune`.

    Attributes:
        recipe: the options by name (`wanda_fast.options`), with the sparsity ratio that was used.
        linears: by the linear's full name in the model.
        reach: how many of the model's weights can be pruned.
        calibration: shape of the tokens or images and their sha256; bos: the token that every window begins
            with, or None.
        perplexity: protocol; the published tables that it is comparable with; dense, pruned; of the pruned
            model against the dense one, over the same predictions: ratio of the perplexities, kl (mean
            KL(dense || pruned) of the next token's distributions, in nats), flips (share of first choices
            that changed).
        block_output_error: by block, ||h' - h||^2 / ||h||^2 of the pruned and the dense model's hidden states
            behind it, over the evaluation windows. Of a streamed model, for blocks that this run pruned.
        accuracy: of an image classifier: protocol; dense and pruned, each as {"top1": ..., "top5": ...}.
        expected: published perplexities that the run is held against: source, row; "dense" and "pruned", each
            with what is published, measured, and apart in percent; differences of the protocol in words;
            not_stated: what the source does not say of its own.
        zero_shot: by task, results of "dense" and "pruned": metrics, their standard errors, number of items.
        seconds: by phase.
        resources: batch size, where activations are kept, and why.
        predicted_memory: bytes above Python and torch, by device.
        peak_memory: bytes by device.
        warnings: as they were logged.
        digests: of model and tokens; none for a model in memory.
        copied: names of "tensors" that the model does not take, and of "files" around the weights, which are
            copied to the output unchanged.
        packed: bytes of the packed output, as `PackedSizes`; empty if it is dense.
        complete: all that was requested is measured and written.
        ranks: of a run by several processes, by rank.
        objects: names of the options that were given as objects of Python, which no command line repeats.
    """

    recipe: dict
    linears: dict[str, LinearReport] = field(default_factory=dict)
    reach: Reach | None = None
    calibration: dict = field(default_factory=dict)
    perplexity: dict = field(default_factory=dict)
    block_output_error: dict[str, float] = field(default_factory=dict)
    accuracy: dict = field(default_factory=dict)
    expected: dict = field(default_factory=dict)
    zero_shot: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    resources: dict = field(default_factory=dict)
    predicted_memory: dict[str, int] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    digests: dict[str, str | None] = field(default_factory=dict)
    copied: dict[str, list[str]] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    complete: bool = False
    ranks: list[RankReport] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)

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

    def expert_tokens(self) -> dict[str, dict[str, float]]:
        """For each module of experts, by its name: how many experts it has, the smallest and the median
        number of calibration tokens that they saw, and how many saw fewer than STARVED_TOKENS.
        """
        counts: dict[str, list[int]] = {}
        for name, tokens in tokens_by_expert(self.linears).items():
            counts.setdefault(name.rpartition(".")[0], []).append(tokens)
        return {
            name: {
                "experts": len(seen),
                "smallest": min(seen),
                "median": median(seen),
                "starved": sum(tokens < STARVED_TOKENS for tokens in seen),
            }
            for name, seen in counts.items()
        }

    def to_json(self) -> str:
        content = asdict(self) | {
            "expert_tokens": self.expert_tokens(),
            "sparsity": self.sparsity,
            "block_sparsity": self.block_sparsity(),
            "block_error": self.block_error(),
            "versions": versions(),
        }
        return json.dumps(content, indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote, except versions."""
        content = json.loads(text)
        report = cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})
        report.linears = {name: LinearReport(**linear) for name, linear in report.linears.items()}
        report.reach = report.reach and Reach(**report.reach)
        report.ranks = [RankReport(**rank) for rank in report.ranks]
        return report

    def published_log(self) -> str:
        """The published code's `log_METHOD.txt`: method, sparsity, perplexity, tab-separated."""
        pruned = self.perplexity.get("pruned")
        value, measure = "-" if pruned is None else f"{pruned:.4f}", "ppl_test"
        if top := self.accuracy.get("pruned"):
            value, measure = f"{100 * top['top1']:.5f}", "acc1"
        lines = [
            f"method\tactual_sparsity\t{measure}",
            f"{self.recipe['prune_method']}\t{self.sparsity:.4f}\t{value}",
        ]
        for task, results in self.zero_shot.items():
            lines.append(f"{task}\t{in_words(results.get('pruned') or results['dense'])}")
        return "\n".join(lines) + "\n"


def tokens_by_expert(linears: dict[str, LinearReport]) -> dict[str, int]:
    """Expert's name -> calibration tokens that it saw; without those of a run that counted none."""
    return {
        name.rpartition(".")[0]: linear.tokens
        for name, linear in linears.items()
        if linear.tokens is not None
    }


def block_name(linear: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3`: up to the first number."""
    parts = linear.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else linear
