"""Prunable weights: matrices `[out, in]`, wherever a model keeps them.

A linear is an `nn.Linear`, a `Conv1D` of GPT-2 (stored transposed), a 1x1 convolution `[out, in, 1, 1]`, or
one matrix of one expert: a slice of a three-dimensional parameter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

# (gate, up, down): in Llama and most others; in Mixtral and InternLM.
GATED_MLP_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Gate and up projection in one linear: Phi-3, GLM-4.
FUSED_NAME = "gate_up_proj"
# Attributes that hold a gated MLP's activation.
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


@dataclass(eq=False)
class GatedMLP:
    """`down(act(gate(x)) * up(x))`.

    Attributes:
        gate, up: the modules that give the two projections; one module that gives both if they are fused.
        activation: of the gate; None if the product is another one than act(gate) * up.
        down: None if no linear of matching width is found.
        split: (gate's output, up's output) of the fused module's output.
        product: the hidden values, of gate's and up's output; None: act(gate) * up.
    """

    gate: nn.Module
    up: nn.Module
    activation: Callable[[Tensor], Tensor] | None
    down: nn.Module | None = None
    split: Callable[[Tensor], Sequence[Tensor]] = lambda output: output.chunk(2, dim=-1)
    product: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def fused(self) -> bool:
        return self.gate is self.up

    def halves(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(gate's output, up's output) `[..., width]`.

        Args:
            outputs: of the fused module, or of gate and up.
        """
        gate, up = self.split(outputs[0]) if self.fused else outputs
        return gate, up

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the down projection reads."""
        return self.activation(gate) * up if self.product is None else self.product(gate, up)

    def effects(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of `hidden` by up and by gate: act(gate) and up * act'(gate), by autograd."""
        # Tensors of the inference mode have no gradients; their clones have, outside of it.
        with torch.inference_mode(False), torch.enable_grad():
            gate, up = (each.detach().clone().requires_grad_() for each in (gate, up))
            by_up, by_gate = torch.autograd.grad(self.hidden(gate, up).sum(), (up, gate))
        return by_up, by_gate


@dataclass(eq=False)
class Linear:
    """A prunable weight of an `nn.Linear`, a `Conv1D` or a 1x1 convolution.

    Attributes:
        name: its full name in the model.
        module: that multiplies by it.
        gated: the gated MLP that it is in; both projections share one object.
        part: of the gated MLP: "gate", "up", or "both" if one weight holds both, the gate's rows first.
        stand_in: a tensor in the weight's place.
    """

    name: str
    module: nn.Module
    gated: GatedMLP | None = None
    part: str | None = None
    stand_in: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, a view of the parameter."""
        return self._view() if self.stand_in is None else self.stand_in

    @property
    def parameter(self) -> str:
        """Full name of the parameter that holds the weight."""
        return f"{self.name}.weight"

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def on_meta(self) -> "Linear":
        """This linear with a weight on the meta device, to compute the size of what is made for it."""
        return replace(self, stand_in=torch.empty(self.weight.shape, dtype=self.weight.dtype, device="meta"))

    def rows(self, x: Tensor) -> Tensor:
        """The module's input as `[..., in]`; a convolution's is `[n, in, h, w]`, and it may skip some."""
        if not isinstance(self.module, nn.Conv2d):
            return x
        down, right = self.module.stride
        return x[..., ::down, ::right].movedim(-3, -1).contiguous()

    def _view(self) -> Tensor:
        weight = self.module.weight
        if isinstance(self.module, nn.Conv2d):
            return weight[:, :, 0, 0]
        return weight if isinstance(self.module, nn.Linear) else weight.t()


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its one weight: `nn.Linear`, transformers' `Conv1D`, a 1x1 `Conv2d`."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.padding in (0, (0, 0))
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def dense_linears(root: nn.Module, prefix: str = "") -> list[Linear]:
    """The linears in `root` that have a module of their own, with their gated MLPs."""
    found = []
    gated = {module: (mlp, part) for module, mlp, part in _gated_mlps(root)}
    for name, module in root.named_modules():
        if is_linear(module):
            found.append(Linear(prefix + name, module, *gated.get(module, (None, None))))
    return found


def _gated_mlps(root: nn.Module) -> Iterator[tuple[nn.Linear, GatedMLP, str]]:
    """(projection, its gated MLP, which part it is) for each gated MLP in `root`.

    A gated MLP has an activation and projections with known names. Gate and up have the same shape, or are
    one linear with twice as many rows as the down projection has inputs.
    """
    for parent in root.modules():
        activation = activation_of(parent)
        if not callable(activation):
            continue
        for names in GATED_MLP_NAMES:
            gate, up, down = (getattr(parent, name, None) for name in names)
            linears = isinstance(gate, nn.Linear) and isinstance(up, nn.Linear)
            if linears and gate.weight.shape == up.weight.shape:
                reads = isinstance(down, nn.Linear) and down.in_features == gate.out_features
                mlp = GatedMLP(gate, up, activation, down if reads else None)
                yield from ((gate, mlp, "gate"), (up, mlp, "up"))
        both, down = getattr(parent, FUSED_NAME, None), getattr(parent, "down_proj", None)
        linears = isinstance(both, nn.Linear) and isinstance(down, nn.Linear)
        if linears and both.out_features == 2 * down.in_features:
            yield both, GatedMLP(both, both, activation, down), "both"


def activation_of(module: nn.Module) -> object:
    """The attribute that holds a gated MLP's activation; None if there is none."""
    return next((getattr(module, name) for name in ACTIVATION_NAMES if hasattr(module, name)), None)
