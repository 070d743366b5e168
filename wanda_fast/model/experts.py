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

from wanda_fast.model.linears import Linear
from wanda_fast.model.patching import forwards_replaced
from wanda_kernels.forward import empty


class Projection(nn.Module):
    """One projection of every expert, called with tokens sorted by expert: `projection(x, offsets)`.

    It is to experts what an `nn.Linear` is to a dense block. Hooks see input and output of all experts.

    Attributes:
        path: the parameter's name below that of the experts.
        parts: names of the matrices that the parameter holds for each expert: gate_proj and up_proj, or one.
        count: of experts.
        transposed: whether the parameter is `[experts, in, out]`.
        interleaved: whether gate and up alternate, row by row.
    """

    def __init__(
        self,
        experts: nn.Module,
        path: str,
        parts: tuple[str, ...],
        count: int,
        transposed: bool = False,
        interleaved: bool = False,
    ):
        super().__init__()
        inside, _, self.parameter = path.rpartition(".")
        # In a tuple, so that the owner is no submodule.
        self._owner = (experts.get_submodule(inside),)
        self.path, self.parts, self.count = path, parts, count
        self.transposed, self.interleaved = transposed, interleaved

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter."""
        return self._owner[0]

    @property
    def stack(self) -> Tensor:
        """`[experts, out, in]`, a view of the parameter."""
        values = getattr(self.owner, self.parameter)[: self.count]
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
        stack, bias = self.stack, getattr(self.owner, f"{self.parameter}_bias", None)
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
    """The experts of one module, which is called with the router's choice for each token.

    Attributes:
        name: the module's full name in the model.
        first: the projection that reads the hidden states: gate and up, or up alone.
        hidden: what the down projections read, of the first projections' output; None: it is not known.
        linears: expert by expert, in the order gate, up, down.
        sees_all: whether the module is called with every token once, as the router got it.
    """

    sees_all = True
    name: str
    module: nn.Module
    first: Projection
    down: Projection
    hidden: Callable[[Tensor], Tensor] | None
    linears: list[ExpertLinear]

    @property
    def count(self) -> int:
        return self.down.count

    @property
    def forwards(self) -> dict[nn.Module, Callable]:
        """The forwards of modules that run by segments instead."""
        return {self.module: self._called}

    def tokens(self, x: Tensor, offsets: Tensor) -> Tensor:
        """How many tokens each expert got of the sorted x, int64 `[experts]`."""
        return offsets.diff()

    def per_token(self, chosen: int) -> int:
        """Experts that a token goes through if the router chooses `chosen`."""
        return chosen

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
        weighted = self._run(x, offsets, weights) * weights.unsqueeze(-1)
        unsorted = torch.empty_like(weighted)
        unsorted[order] = weighted
        return unsorted.view(-1, k, x.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _run(self, x: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
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

    def _called(self, *args, **kwargs) -> Tensor:
        """`forward`, with the arguments of the module's own forward, by position or by name."""
        own = inspect.unwrap(type(self.module).forward)
        given = inspect.signature(own).bind(self.module, *args, **kwargs)
        return self.forward(*given.args[1:])


class ScaledExperts(Experts):
    """Llama 4's: every token goes through every expert, scaled by the router; it is zero for the others."""

    sees_all = False

    def tokens(self, x: Tensor, offsets: Tensor) -> Tensor:
        return x.ne(0).any(-1).view(self.count, -1).sum(1)

    def per_token(self, chosen: int) -> int:
        return self.count

    def forward(self, hidden_states: Tensor) -> Tensor:
        """
        Args:
            hidden_states: `[experts * tokens, features]`, expert by expert.
        """
        tokens = len(hidden_states) // self.count
        offsets = torch.arange(self.count + 1, device=hidden_states.device) * tokens
        return self._run(hidden_states, offsets, None)


class ParallelExperts(Experts):
    """JetMoE's: a module for each projection, called with sorted tokens and the number of each expert's."""

    sees_all = False

    @property
    def forwards(self) -> dict[nn.Module, Callable]:
        return {each.owner: partial(_by_sizes, each) for each in (self.first, self.down)}


def _by_sizes(projection: Projection, inputs: Tensor, expert_size: list[int]) -> Tensor:
    offsets = torch.tensor([0, *expert_size], device=inputs.device).cumsum(0)
    return projection(inputs, offsets, None)


@contextmanager
def sorted_by_expert(experts: list[Experts]) -> Iterator[None]:
    """Context in which the experts run by segments of sorted tokens."""
    replaced: dict[nn.Module, Callable] = {}
    for each in experts:
        replaced |= each.forwards
    with forwards_replaced(replaced):
        yield


def segments(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, begin, end) of every expert that has tokens. Waits for a GPU."""
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > begin:
            yield expert, begin, end


def _multiplies_groups(x: Tensor, stack: Tensor) -> bool:
    """Whether torch multiplies all segments at once: on a GPU, in bf16, with rows of 16, 32, ... bytes."""
    fits = x.is_cuda and x.dtype == stack.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return fits and all(size % 8 == 0 for size in stack.shape[1:])
