"""Finds a model's repeated blocks, the prunable linears in each, and its gated MLPs."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wanda_fast.errors import IgnorePatternError, NoPrunableBlockError, NotStreamableError

# (gate, up, down): in Llama and most others; in Mixtral and InternLM.
GATED_MLP_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Gate and up projection in one linear: Phi-3, GLM-4.
FUSED_NAME = "gate_up_proj"
# Attributes that hold a gated MLP's activation.
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
# Modules that route tokens to experts, and attributes of a configuration that say how many experts there are.
ROUTER_NAMES = {"router", "router_gate", "shared_expert_gate"}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(eq=False)
class GatedMLP:
    """`down(act(gate(x)) * up(x))`.

    If gate and up are fused, `gate` and `up` are the same linear, whose first half of rows is the gate.

    Attributes:
        down: None if no linear of matching width is found.
    """

    gate: nn.Linear
    up: nn.Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: nn.Linear | None = None

    @property
    def fused(self) -> bool:
        return self.gate is self.up

    @property
    def width(self) -> int:
        """out_features of each projection."""
        return self.up.out_features // (2 if self.fused else 1)

    def halves(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate's output, up's output) `[..., width]`.

        Args:
            outputs: of the fused linear, or of gate and up.
        """
        gate, up = outputs[0].chunk(2, dim=-1) if self.fused else outputs
        return gate, up


@dataclass
class Linear:
    """A prunable linear.

    Attributes:
        name: its full name in the model.
        gated: the gated MLP that it is the gate or up projection of; both share one object.
    """

    name: str
    module: nn.Linear
    gated: GatedMLP | None = None


@dataclass
class Block:
    """One repeated layer of the model."""

    name: str
    module: nn.Module
    linears: list[Linear]


def find_blocks(model: nn.Module, ignore: tuple[str, ...] = ()) -> list[Block]:
    """The repeated layers of `model` with their prunable linears, in the order in which they run.

    The blocks are the elements of the `nn.ModuleList` whose nn.Linear modules have the most weights. If
    transformers says which part of the model is the language model, only lists in that part are considered.
    Routers are not prunable.

    Args:
        ignore: patterns of linears to leave dense: exact names of linears or of modules around them, globs,
            or "re:" and a regular expression.
    Raises: `NoPrunableBlockError`; `IgnorePatternError` if a pattern is invalid or matches no linear.
    """
    path, layers = _block_list(model)
    ignored = _ignored_names(_linear_names(path, layers), ignore)
    routers = _router_names(model)
    blocks = []
    for index, layer in enumerate(layers):
        name = f"{path}.{index}"
        gated = dict(_gated_mlps(layer))
        linears = [
            Linear(f"{name}.{child}", module, gated.get(module))
            for child, module in _named_linears(layer)
            if f"{name}.{child}" not in ignored and routers.isdisjoint(child.split("."))
        ]
        blocks.append(Block(name, layer, linears))
    return blocks


def ignored_linears(model: nn.Module, ignore: tuple[str, ...]) -> dict[str, list[str]]:
    """For each `ignore` pattern, the names of the linears that it matches."""
    names = _linear_names(*_block_list(model))
    return {pattern: _matches(pattern, names) for pattern in ignore}


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
    weights = {
        name: sum(linear.weight.numel() for _, linear in _named_linears(module))
        for name, module in lists.items()
    }
    # An image encoder can hold more weight than the language model.
    language = _language_modules(model)
    decoding = [name for name, module in lists.items() if weights[name] and module in language]
    # An outer list has at least the weights of its inner lists. It comes first, so it wins a tie.
    best = max(decoding or lists, key=weights.get, default=None)
    if best is None or not weights[best]:
        owners = {type(owner).__name__ for owner in model.modules() if list(owner.parameters(recurse=False))}
        raise NoPrunableBlockError(
            f"{type(model).__name__} has no repeated block with nn.Linear weights; "
            f"its weights are in {', '.join(sorted(owners))}"
        )
    return best, model.get_submodule(best)


def _language_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of the language model, if transformers says which part that is; otherwise all modules."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return set((decoder if isinstance(decoder, nn.Module) else model).modules())


def _named_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))


def _linear_names(path: str, layers: nn.ModuleList) -> list[str]:
    return [
        f"{path}.{index}.{name}" for index, layer in enumerate(layers) for name, _ in _named_linears(layer)
    ]


def _gated_mlps(layer: nn.Module) -> Iterator[tuple[nn.Linear, GatedMLP]]:
    """(gate or up projection, its gated MLP) for each gated MLP in `layer`.

    A gated MLP has an activation and projections with known names. Gate and up have the same shape, or are
    one linear with twice as many rows as the down projection has inputs.
    """
    for parent in layer.modules():
        activation = next((getattr(parent, name) for name in ACTIVATION_NAMES if hasattr(parent, name)), None)
        if not callable(activation):
            continue
        for names in GATED_MLP_NAMES:
            gate, up, down = (getattr(parent, name, None) for name in names)
            linears = isinstance(gate, nn.Linear) and isinstance(up, nn.Linear)
            if linears and gate.weight.shape == up.weight.shape:
                reads = isinstance(down, nn.Linear) and down.in_features == gate.out_features
                mlp = GatedMLP(gate, up, activation, down if reads else None)
                yield from ((gate, mlp), (up, mlp))
        both, down = getattr(parent, FUSED_NAME, None), getattr(parent, "down_proj", None)
        linears = isinstance(both, nn.Linear) and isinstance(down, nn.Linear)
        if linears and both.out_features == 2 * down.in_features:
            yield both, GatedMLP(both, both, activation, down)


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
