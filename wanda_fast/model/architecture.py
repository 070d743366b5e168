"""Finds a model's repeated blocks, and the prunable linears in each."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from wanda_fast.errors import IgnorePatternError, NotStreamableError
from wanda_fast.model.block_lists import block_chains
from wanda_fast.model.experts import ExpertLinear, Experts
from wanda_fast.model.find_experts import find_experts
from wanda_fast.model.linears import Linear, dense_linears

# Modules that route tokens to experts, and attributes of a configuration that say how many experts there are.
ROUTER_NAMES = {"router", "router_gate", "shared_expert_gate"}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(eq=False)
class Stage:
    """What a forward calls as one: a linear's module, or one projection of all experts."""

    name: str
    module: nn.Module
    linears: list[Linear]


@dataclass
class Block:
    """One repeated layer of the model.

    Attributes:
        linears: those to prune.
        experts: all modules of experts in the layer.
        chain: number of the chain that it is in. What stands between two chains, such as the downsampling
            between the stages of an image classifier, is in no block.
    """

    name: str
    module: nn.Module
    linears: list[Linear]
    experts: list[Experts] = field(default_factory=list)
    chain: int = 0

    @property
    def dense(self) -> list[Linear]:
        """The linears that are no expert's."""
        return [linear for linear in self.linears if not isinstance(linear, ExpertLinear)]

    def in_passes(self, count: int) -> list["Block"]:
        """The block in `count` parts of its experts, the last of which has its other linears too."""
        most = max((each.count for each in self.experts), default=1)
        count = min(count, most)
        parts: list[list[Linear]] = [[] for _ in range(count)]
        for linear in self.linears:
            last = not isinstance(linear, ExpertLinear)
            parts[-1 if last else linear.index * count // most].append(linear)
        return [replace(self, linears=part) for part in parts]

    @cached_property
    def stages(self) -> list[Stage]:
        """The linears by the module that multiplies by them."""
        by_module: dict[nn.Module, list[Linear]] = {}
        for linear in self.linears:
            by_module.setdefault(linear.module, []).append(linear)
        names = {
            module: linears[0].parameter.removesuffix(".weight") for module, linears in by_module.items()
        }
        return [Stage(names[module], module, linears) for module, linears in by_module.items()]


def find_blocks(model: nn.Module, ignore: tuple[str, ...] = ()) -> list[Block]:
    """The repeated layers of `model` with their prunable linears, in the order in which they run.

    The blocks are those of `block_chains`. Routers are not prunable.

    Args:
        ignore: patterns of linears to leave dense: exact names of linears or of modules around them, globs,
            or "re:" and a regular expression.
    Raises: `NoPrunableBlockError`; `IgnorePatternError` if a pattern is invalid or matches no linear.
    """
    blocks = _whole_blocks(model)
    ignored = _ignored_names([linear.name for block in blocks for linear in block.linears], ignore)
    routers = _router_names(model)
    for block in blocks:
        block.linears = [
            linear
            for linear in block.linears
            if linear.name not in ignored and not _is_in(routers, linear.name.removeprefix(block.name))
        ]
    return blocks


def ignored_linears(model: nn.Module, ignore: tuple[str, ...]) -> dict[str, list[str]]:
    """For each `ignore` pattern, the names of the linears that it matches."""
    names = [linear.name for block in _whole_blocks(model) for linear in block.linears]
    return {pattern: matching(pattern, names) for pattern in ignore}


def all_linears(model: nn.Module) -> dict[str, Linear]:
    """Every linear of a model by its name, in its blocks and outside of them."""
    experts = [linear for each in find_experts(model) for linear in each.linears]
    return {linear.name: linear for linear in [*dense_linears(model), *experts]}


def require_untied_blocks(model: nn.Module, tied: Iterable[list[str]]) -> None:
    """Raise `NotStreamableError` if two blocks share a tensor: it would be unloaded with either of them.

    Args:
        tied: for each tensor, all of its names.
    """
    prefixes = [f"{block.name}." for block in _whole_blocks(model)]
    for names in tied:
        by_block = {prefix: name for prefix in prefixes for name in names if name.startswith(prefix)}
        if len(by_block) > 1:
            first, second, *_ = by_block.values()
            raise NotStreamableError(f"{first} and {second} are one weight, in two blocks")


def _whole_blocks(model: nn.Module) -> list[Block]:
    """The repeated layers with all of their linears."""
    return [
        _whole_block(name, model.get_submodule(name), chain)
        for chain, names in enumerate(block_chains(model))
        for name in names
    ]


def _whole_block(name: str, layer: nn.Module, chain: int) -> Block:
    """A layer with all of its linears: those of the dense modules, then the experts'."""
    experts = find_experts(layer, f"{name}.")
    linears = [linear for each in experts for linear in each.linears]
    return Block(name, layer, [*dense_linears(layer, f"{name}."), *linears], experts, chain)


def _called(linear: Linear) -> str:
    return linear.parameter.removesuffix(".weight")


def _is_in(names: set[str], name: str) -> bool:
    return not names.isdisjoint(name.split("."))


def _router_names(model: nn.Module) -> set[str]:
    """Names of linears that route tokens to experts, or of modules around them.

    `gate` is a router only in a model that has experts.
    """
    config = getattr(model, "config", None)
    # The language model's part, in a model of text and images.
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    has_experts = any(getattr(config, count, None) for count in EXPERT_COUNTS)
    return ROUTER_NAMES | {"gate"} if has_experts else ROUTER_NAMES


def _ignored_names(names: list[str], ignore: tuple[str, ...]) -> set[str]:
    ignored = set()
    for pattern in ignore:
        matched = matching(pattern, names)
        if not matched:
            example = f", e.g. {names[0]}" if names else ""
            raise IgnorePatternError(
                f"ignore pattern {pattern!r} matches none of the {len(names)} linears{example}"
            )
        ignored.update(matched)
    return ignored


def matching(pattern: str, names: list[str], what: str = "ignore pattern") -> list[str]:
    """The names that a pattern matches; see `find_blocks`. Expressions match as in `re.match`.

    Args:
        what: the pattern's name in the message of an `IgnorePatternError`.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise IgnorePatternError(
                f"{what} {pattern!r} is not a valid regular expression: {error}"
            ) from error
        return [name for name in names if expression.match(name)]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")]
