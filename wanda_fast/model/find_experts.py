"""Finds the modules whose three-dimensional parameters hold experts, by structure."""

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from wanda_fast.model.experts import ExpertLinear, Experts, ParallelExperts, Projection, ScaledExperts
from wanda_fast.model.linears import GatedMLP, activation_of

# Parameters that hold the first projection of all experts, and their parts.
FIRST_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",)}
DOWN = "down_proj"
# JetMoE's modules of all experts.
PARALLEL_NAMES = ("input_linear", "output_linear")


def find_experts(root: nn.Module, prefix: str = "") -> list[Experts]:
    """The modules in `root` whose parameters hold experts in a known form."""
    found = (_experts_in(prefix + name, module) for name, module in root.named_modules())
    return [experts for experts in found if experts is not None]


def _experts_in(name: str, module: nn.Module) -> Experts | None:
    first = next((each for each in FIRST_PARTS if _dim(module, each) == 3), None)
    if first is not None and _dim(module, DOWN) == 3 and (kind := _kind(module)) is not None:
        return _stacked(kind, name, module, first)
    if all(_dim(getattr(module, each, None), "weight") == 3 for each in PARALLEL_NAMES):
        return _parallel(name, module)
    return None


def _kind(module: nn.Module) -> type[Experts] | None:
    """The class of experts that are called as the module is; None if that is unknown."""
    if not hasattr(module, "_apply_gate") and not callable(activation_of(module)):
        return None
    arguments = len(inspect.signature(inspect.unwrap(type(module).forward)).parameters) - 1
    # Hidden states, the experts of each token, and their weights; or hidden states alone.
    return {3: Experts, 1: ScaledExperts}.get(arguments)


def _stacked(kind: type[Experts], name: str, module: nn.Module, parameter: str) -> Experts:
    parts, transposed = FIRST_PARTS[parameter], _is_transposed(module, parameter)
    count, interleaved = len(getattr(module, DOWN)), not getattr(module, "is_concatenated", True)
    first = Projection(module, parameter, parts, count, transposed, interleaved)
    down = Projection(module, DOWN, (DOWN,), count, transposed)
    if len(parts) == 1:
        return _with_linears(kind(name, module, first, down, activation_of(module), []), None)
    gate = _gate_of(module)
    return _with_linears(kind(name, module, first, down, gate, []), _gated(module, first, down, gate))


def _parallel(name: str, module: nn.Module) -> Experts:
    count = len(getattr(module, PARALLEL_NAMES[0]).weight)
    first, down = (Projection(module, f"{each}.weight", (each,), count) for each in PARALLEL_NAMES)
    return _with_linears(ParallelExperts(name, module, first, down, None, []), None)


def _with_linears(experts: Experts, gated: GatedMLP | None) -> Experts:
    for index in range(experts.count):
        for projection in (experts.first, experts.down):
            of_gated = gated if projection is experts.first else None
            for part in projection.parts:
                role = part.removesuffix("_proj") if of_gated else None
                linear = ExpertLinear(f"{experts.name}.{index}.{part}", projection, of_gated, role)
                linear.experts, linear.index, linear.matrix = experts, index, part
                experts.linears.append(linear)
    return experts


def _gated(
    module: nn.Module, first: Projection, down: Projection, gate: Callable[[Tensor], Tensor]
) -> GatedMLP:
    """The gated MLP of all experts: its modules give the outputs of all."""
    own = getattr(type(module), "_apply_gate", None)
    if own is None or own.__name__ == "_default_apply_gate":
        return GatedMLP(first, first, activation_of(module), down, first.split)
    return GatedMLP(first, first, None, down, first.split, lambda g, u: gate(first.joined(g, u)))


def _gate_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What makes the hidden values of the first projection's output."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate
    activation = activation_of(module)

    def gate_of(first: Tensor) -> Tensor:
        gate, up = first.chunk(2, dim=-1)
        return activation(gate) * up

    return gate_of


def _is_transposed(module: nn.Module, first: str) -> bool:
    """Whether the parameters are `[experts, in, out]`."""
    if hasattr(module, "is_transposed"):
        return module.is_transposed
    return getattr(module, first).shape[1] == getattr(module, DOWN).shape[2]


def _dim(module: nn.Module | None, name: str) -> int | None:
    """The number of dimensions of a module's own parameter; None if it has none of that name."""
    value = module._parameters.get(name) if isinstance(module, nn.Module) else None
    return None if value is None else value.dim()
