"""Experts in three-dimensional parameters: their matrices as linears, and a forward by segments of tokens.

transformers keeps the gate and up projections of all experts in one parameter, the down projections in
another. The experts' forward is replaced by one that sorts the tokens by expert once; then each projection is
one call for all experts, with the tokens of expert e in the rows `offsets[e]:offsets[e + 1]`.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_fast.model.linears import GatedMLP, Linear, activation_of
from wanda_fast.model.patching import forwards_replaced
from wanda_kernels.forward import empty

# Parameters that hold the first projection of all experts.
FIRST_NAMES, DOWN_NAME = ("gate_up_proj", "up_proj"), "down_proj"
# JetMoE's modules of all experts, called with the tokens sorted and the number of each expert's.
PARALLEL_NAMES = ("input_linear", "output_linear")
# Parameters of an expert forward behind the hidden states: the experts of each token, and their weights.
ROUTED_ARGUMENTS = 2


class Projection(nn.Module):
    """One projection of every expert, called with tokens sorted by expert: `projection(x, offsets)`.

    It is to experts what an `nn.Linear` is to a dense block. Hooks see input and output of all experts.

    Attributes:
        path: the parameter's name below that of the experts.
        parts: names of the matrices that the parameter holds for each expert: gate_proj and up_proj, or one.
        interleaved: whether gate and up alternate, row by row.
        count: of experts.
    """

    def __init__(self, owner: nn.Module, path: str, parts: tuple[str, ...], count: int):
        super().__init__()
        inside, _, self.parameter = path.rpartition(".")
        # In a tuple, so that the owner is no submodule.
        self._owner = (owner.get_submodule(inside),)
        self.path, self.parts, self.count = path, parts, count
        self.transposed = not inside and _is_transposed(owner)
        self.interleaved = len(parts) == 2 and not getattr(owner, "is_concatenated", True)

    @property
    def stack(self) -> Tensor:
        """`[experts, out, in]`, a view of the parameter."""
        values = getattr(self._owner[0], self.parameter)[: self.count]
        return values.transpose(1, 2) if self.transposed else values

    def rows(self, part: str) -> slice:
        """The rows of a part in every expert's piece of the stack."""
        if len(self.parts) == 1:
            return slice(None)
        which, half = self.parts.index(part), self.stack.shape[1] // 2
        return slice(which, None, 2) if self.interleaved else slice(which * half, (which + 1) * half)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """(gate's output, up's output) of the projection's output."""
        if self.interleaved:
            return output[..., ::2], output[..., 1::2]
        gate, up = output.chunk(2, dim=-1)
        return gate, up

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """The projection's output of gate's and up's: the reverse of `split`."""
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)
        return torch.cat((gate, up), dim=-1)

    def forward(self, x: Tensor, offsets: Tensor, router_weights: Tensor | None) -> Tensor:
        """The outputs `[tokens, out]`; rows behind the last offset belong to no expert and are not computed.

        Args:
            x: `[tokens, in]`.
            offsets: int64 `[experts + 1]`.
            router_weights: `[tokens]`, for hooks that count a token by its weight.
        """
        if x.is_meta:
            return x.new_empty(len(x), self.stack.shape[1])
        stack, bias = self.stack, getattr(self._owner[0], f"{self.parameter}_bias", None)
        if _multiplies_groups(x, stack):
            output = F.grouped_mm(x, stack.transpose(1, 2), offs=offsets[1:].int())
            if bias is not None:
                experts = torch.repeat_interleave(offsets.diff(), output_size=len(x))
                output += bias[experts]
            return output
        output = empty(len(x), stack.shape[1], dtype=x.dtype, device=x.device)
        for expert, begin, end in segments(offsets):
            output[begin:end] = F.linear(x[begin:end], stack[expert])
            if bias is not None:
                # Rounded before the bias is added, as transformers' experts are.
                output[begin:end] += bias[expert]
        return output


@dataclass(eq=False)
class ExpertLinear(Linear):
    """One matrix of one expert. `module` is the projection that multiplies by it."""

    experts: "Experts | None" = None
    index: int = 0
    matrix: str = ""

    @property
    def parameter(self) -> str:
        return f"{self.experts.name}.{self.module.path}"

    def _view(self) -> Tensor:
        return self.module.stack[self.index, self.module.rows(self.matrix)]


@dataclass(eq=False)
class Experts:
    """The experts of one module.

    Attributes:
        name: the module's full name in the model.
        first: the projection that reads the hidden states: gate and up, or up alone.
        linears: expert by expert, in the order gate, up, down.
        parallel: whether only the two projections are known, and not what is between them: JetMoE's.
    """

    name: str
    module: nn.Module
    first: Projection
    down: Projection
    linears: list[ExpertLinear]
    parallel: bool = False

    @property
    def count(self) -> int:
        return self.down.count

    def hidden(self, first: Tensor) -> Tensor:
        """What the down projections read, of the first projections' output."""
        if len(self.first.parts) == 2:
            return _gate_of(self.module)(first)
        return self.module.act_fn(first)

    def per_token(self, chosen: int) -> int:
        """Experts that a token goes through in a model that chooses so many: all, in Llama 4's."""
        return self.count if _form(self.module) is Experts.forward_sorted else chosen

    @property
    def forwards(self) -> dict[nn.Module, Callable]:
        """The forwards of modules that run by segments instead."""
        if not self.parallel:
            return {self.module: partial(_run, self)}
        pairs = zip(PARALLEL_NAMES, (self.first, self.down), strict=True)
        return {getattr(self.module, name): partial(_run_parallel, each) for name, each in pairs}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output: the sum over a token's experts of their outputs, by the router's weights.

        Args:
            hidden_states: `[tokens, features]`.
            top_k_index: `[tokens, k]`; an index that is no expert's adds nothing.
            top_k_weights: `[tokens, k]`.
        """
        k = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        offsets = torch.searchsorted(experts, torch.arange(self.count + 1, device=experts.device))
        weights = top_k_weights.reshape(-1)[order]
        x = hidden_states[order // k]
        output = self.run(x, offsets, weights)
        weighted = output * weights.unsqueeze(-1)
        unsorted = torch.empty_like(weighted)
        unsorted[order] = weighted
        return unsorted.view(-1, k, x.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def run(self, x: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Each row's expert's output, `[tokens, features]`.

        Args:
            weights: the router's, `[tokens]`; None: the router has scaled x already.
        """
        first = self.first(x, offsets, weights)
        output = self.down(self.hidden(first), offsets, weights)
        if getattr(self.module, "has_post_expert_norm", False):
            output = self.module.post_expert_norm(output)
        if hasattr(self.module, "identity_expert"):
            output[offsets[-1] :] = x[offsets[-1] :]
        elif x.device.type == "cpu":
            output[offsets[-1] :] = 0
        return output

    def forward_sorted(self, hidden_states: Tensor) -> Tensor:
        """Llama 4's: every token goes through every expert, scaled by the router; it is zero for the others.

        Args:
            hidden_states: `[experts * tokens, features]`, expert by expert.
        """
        tokens = len(hidden_states) // self.count
        offsets = torch.arange(self.count + 1, device=hidden_states.device) * tokens
        return self.run(hidden_states, offsets, None)


def find_experts(root: nn.Module, prefix: str = "") -> list[Experts]:
    """The modules in `root` whose parameters hold experts in a known form."""
    found = []
    for name, module in root.named_modules():
        first = next((each for each in FIRST_NAMES if _dim(module, each) == 3), None)
        if first is not None and _dim(module, DOWN_NAME) == 3 and _form(module) is not None:
            found.append(_experts(prefix + name, module, first))
        elif all(_dim(getattr(module, each, None), "weight") == 3 for each in PARALLEL_NAMES):
            found.append(_parallel_experts(prefix + name, module))
    return found


@contextmanager
def sorted_by_expert(experts: list[Experts]) -> Iterator[None]:
    """Context in which the experts run by segments of sorted tokens."""
    replaced: dict[nn.Module, Callable] = {}
    for each in experts:
        replaced |= each.forwards
    with forwards_replaced(replaced):
        yield


def _run(experts: Experts, *args, **kwargs) -> Tensor:
    """Call the experts with the arguments of the module's own forward, by position or by name."""
    own = inspect.unwrap(type(experts.module).forward)
    given = inspect.signature(own).bind(experts.module, *args, **kwargs)
    return _form(experts.module)(experts, *given.args[1:])


def _run_parallel(projection: Projection, inputs: Tensor, expert_size: list[int]) -> Tensor:
    offsets = torch.tensor([0, *expert_size], device=inputs.device).cumsum(0)
    return projection(inputs, offsets, None)


def segments(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, begin, end) of every expert that has tokens. Waits for a GPU."""
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > begin:
            yield expert, begin, end


def _experts(name: str, module: nn.Module, parameter: str) -> Experts:
    count = len(getattr(module, DOWN_NAME))
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("up_proj",)
    first = Projection(module, parameter, parts, count)
    down = Projection(module, DOWN_NAME, ("down_proj",), count)
    gated = _gated(module, first, down) if len(parts) == 2 else None
    return _with_linears(Experts(name, module, first, down, []), gated)


def _parallel_experts(name: str, module: nn.Module) -> Experts:
    count = len(getattr(module, PARALLEL_NAMES[0]).weight)
    first, down = (Projection(module, f"{each}.weight", (each,), count) for each in PARALLEL_NAMES)
    return _with_linears(Experts(name, module, first, down, [], parallel=True), None)


def _with_linears(experts: Experts, gated: GatedMLP | None) -> Experts:
    first = experts.first
    for index in range(experts.count):
        for projection in (first, experts.down):
            for part in projection.parts:
                role = part.removesuffix("_proj") if gated is not None and projection is first else None
                linear = ExpertLinear(f"{experts.name}.{index}.{part}", projection, role and gated, role)
                linear.experts, linear.index, linear.matrix = experts, index, part
                experts.linears.append(linear)
    return experts


def _gated(module: nn.Module, first: Projection, down: Projection) -> GatedMLP:
    """The gated MLP of all experts: its modules give the outputs of all."""
    plain = not _has_own_gate(module)
    product = None if plain else lambda gate, up: _gate_of(module)(first.joined(gate, up))
    return GatedMLP(first, first, activation_of(module) if plain else None, down, first.split, product)


def _has_own_gate(module: nn.Module) -> bool:
    own = getattr(type(module), "_apply_gate", None)
    return own is not None and own.__name__ != "_default_apply_gate"


def _gate_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if hasattr(module, "_apply_gate"):
        return module._apply_gate
    activation = activation_of(module)

    def gate_of(first: Tensor) -> Tensor:
        gate, up = first.chunk(2, dim=-1)
        return activation(gate) * up

    return gate_of


def _form(module: nn.Module) -> Callable | None:
    """The method of `Experts` that replaces the module's forward; None if its form is unknown."""
    if not hasattr(module, "_apply_gate") and not callable(activation_of(module)):
        return None
    arguments = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())[2:]
    if len(arguments) == ROUTED_ARGUMENTS:
        return Experts.forward
    return Experts.forward_sorted if not arguments else None


def _is_transposed(module: nn.Module) -> bool:
    """Whether the parameters are `[experts, in, out]`."""
    if hasattr(module, "is_transposed"):
        return module.is_transposed
    first = next(getattr(module, each) for each in FIRST_NAMES if _dim(module, each) == 3)
    return first.shape[1] == getattr(module, DOWN_NAME).shape[2]


def _dim(module: nn.Module | None, name: str) -> int | None:
    """The number of dimensions of a module's own parameter; None if it has none of that name."""
    value = module._parameters.get(name) if isinstance(module, nn.Module) else None
    return None if value is None else value.dim()


def _multiplies_groups(x: Tensor, stack: Tensor) -> bool:
    """Whether torch multiplies all segments at once: on a GPU, in bf16, with rows of 16, 32, ... bytes."""
    fits = x.is_cuda and x.dtype == stack.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return fits and all(size % 8 == 0 for size in stack.shape[1:])
