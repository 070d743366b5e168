"""The activations of a gated MLP that the kernels know, by name, and their derivatives."""

from functools import partial

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda gate: gate,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
}

# (up, gate) -> up * act'(gate)
GATE_EFFECTS = {
    None: lambda up, gate: up,
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward, threshold=0),
}
