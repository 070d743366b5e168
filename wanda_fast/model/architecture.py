"""Finds a model's repeated blocks, and the prunable linears in each."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from wanda_fast.errors import IgnorePatternError, NoPrunableBlockError, NotStreamableError
from wanda_fast.model.experts import ExpertLinear, Experts
from wanda_fast.model.find_experts import find_experts
from wanda_fast.model.linears import Linear, dense_linears, is_linear

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
    """

    name: str
    module: nn.Module
    linears: list[Linear]
    experts: list[Experts] = field(default_factory=list)

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

    The blocks are the elements of the `nn.ModuleList` whose linears have the most weights. If
    transformers says which part of the model is the language model, only lists in that part are considered.
    Routers are not prunable.

    Args:
        ignore: patterns of linears to leave dense: exact names of linears or of modules around them, globs,
            or "re:" and a regular expression.
    Raises: `NoPrunableBlockError`; `IgnorePatternError` if a pattern is invalid or matches no linear.
    """
    path, layers = _block_list(model)
    blocks = [_whole_block(f"{path}.{index}", layer) for index, layer in enumerate(layers)]
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
    path, layers = _block_list(model)
    names = [x.name for i, layer in enumerate(layers) for x in _whole_block(f"{path}.{i}", layer).linears]
    return {pattern: _matches(pattern, names) for pattern in ignore}


def all_linears(model: nn.Module) -> dict[str, Linear]:
    """Every linear of a model by its name, in its blocks and outside of them."""
    experts = [linear for each in find_experts(model) for linear in each.linears]
    return {linear.name: linear for linear in [*dense_linears(model), *experts]}


def require_untied_blocks(model: nn.Module, tied: Iterable[list[str]]) -> None:
    """Raise `NotStreamableError` if two blocks share a tensor: it would be unloaded with either of them.

    Args:
        tied: for each tensor, all of its names.
    """
    prefix = _block_list(model)[0] + "."
    for names in tied:
        inside = [name for name in names if name.startswith(prefix)]
        by_block = {name.removeprefix(prefix).split(".")[0]: name for name in inside}
        if len(by_block) > 1:
            first, second, *_ = by_block.values()
            raise NotStreamableError(f"{first} and {second} are one weight, in two blocks")


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    weights = {name: _prunable_weights(module) for name, module in lists.items()}
    # An image encoder can hold more weight than the language model.
    language = _language_modules(model)
    decoding = [name for name, module in lists.items() if weights[name] and module in language]
    # An outer list has at least the weights of its inner lists. It comes first, so it wins a tie.
    best = max(decoding or lists, key=weights.get, default=None)
    if best is None or not weights[best]:
        owners = {type(owner).__name__ for owner in model.modules() if list(owner.parameters(recurse=False))}
        raise NoPrunableBlockError(
            f"{type(model).__name__} has no repeated block with prunable weights; "
            f"its weights are in {', '.join(sorted(owners))}"
        )
    return best, model.get_submodule(best)


def _language_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of the language model, if transformers says which part that is; otherwise all modules."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return set((decoder if isinstance(decoder, nn.Module) else model).modules())


def _prunable_weights(module: nn.Module) -> int:
    stacks = [stack for each in find_experts(module) for stack in (each.first.stack, each.down.stack)]
    weights = [child.weight for child in module.modules() if is_linear(child)]
    return sum(weight.numel() for weight in [*weights, *stacks])


def _whole_block(name: str, layer: nn.Module) -> Block:
    """A layer with all of its linears: those of the dense modules, then the experts'."""
    experts = find_experts(layer, f"{name}.")
    linears = [linear for each in experts for linear in each.linears]
    return Block(name, layer, [*dense_linears(layer, f"{name}."), *linears], experts)


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
        matched = _matches(pattern, names)
        if not matched:
            raise IgnorePatternError(
                f"ignore pattern {pattern!r} matches none of the {len(names)} linears, e.g. {names[0]}"
            )
        ignored.update(matched)
    return ignored


def _matches(pattern: str, names: list[str]) -> list[str]:
    """The names that an --ignore pattern matches; see `find_blocks`. Expressions match as in `re.match`."""
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise IgnorePatternError(
                f"ignore pattern {pattern!r} is not a valid regular expression: {error}"
            ) from error
        return [name for name in names if expression.match(name)]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")]
