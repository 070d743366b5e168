"""Experts as the published code knows them: an MLP of three nn.Linear each, called one after the other."""

import torch
from torch import Tensor, nn

from wanda_fast.model.experts import Experts
from wanda_fast.model.find_experts import find_experts


class Expert(nn.Module):
    """One expert's MLP; its weights are views of the parameters that hold all experts."""

    def __init__(self, experts: Experts, index: int):
        super().__init__()
        self.act_fn = experts.module.act_fn
        for linear in experts.linears:
            if linear.index == index:
                setattr(self, linear.matrix, _linear(linear.weight.data))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LinearExperts(nn.ModuleList):
    """In the place of a module of experts without biases, as transformers 4 had them."""

    def __init__(self, experts: Experts):
        super().__init__(Expert(experts, index) for index in range(experts.count))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, choice = torch.where(top_k_index == index)
            if len(token):
                weights = top_k_weights[token, choice, None]
                output.index_add_(0, token, (expert(hidden_states[token]) * weights).to(output.dtype))
        return output


def with_linear_experts(model: nn.Module) -> nn.Module:
    """The model, in place, with its experts as `LinearExperts`."""
    for experts in find_experts(model):
        parent, _, name = experts.name.rpartition(".")
        setattr(model.get_submodule(parent), name, LinearExperts(experts))
    return model


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
