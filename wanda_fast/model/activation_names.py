"""Activation functions by the names that the kernels know."""

from collections.abc import Callable

from torch import Tensor, nn

# class or function name of an activation -> the kernels' name
KERNEL_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "gelu": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "relu": "relu",
}


def kernel_activation(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The kernels' name of an activation; None if they have no code for it."""
    is_module = isinstance(activation, nn.Module)
    if is_module and any(True for _ in activation.parameters()):
        return None
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return "gelu_tanh"
    name = type(activation).__name__ if is_module else getattr(activation, "__name__", "")
    return KERNEL_ACTIVATIONS.get(name)
