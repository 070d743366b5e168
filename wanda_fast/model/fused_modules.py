"""RMSNorm, the gated MLP's product and the rotary embedding, by one kernel each.

A module is replaced only if its own code is the same as Llama's. transformers repeats this code in the file
of every model, so the compiled code tells whether a class computes the same: Mistral's and Qwen's do, Gemma's
norm does not.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType

from torch import Tensor, nn

from wanda_fast.model.activation_names import kernel_activation
from wanda_fast.model.patching import forwards_replaced
from wanda_kernels.forward import elementwise_kernels

# The name by which attention modules call the rotary embedding.
ROTARY = "apply_rotary_pos_emb"


@contextmanager
def fused_modules(block: nn.Module) -> Iterator[None]:
    """Context in which the block's norms, MLPs and rotary embeddings run by kernels.

    Operands that a kernel does not support go to the module's own forward. So do all calls of a module whose
    forward was set on the instance.
    """
    devices = {parameter.device for parameter in block.parameters()}
    served = any(elementwise_kernels(device) is not None for device in devices)
    modules = [module for module in block.modules() if served and "forward" not in vars(module)]
    fusions = {module: fusion for module in modules if (fusion := _fusion(type(module)))}
    with forwards_replaced({m: partial(fusion, m, m.forward) for m, fusion in fusions.items()}):
        yield


def _rms_norm(norm: nn.Module, own: Callable, hidden_states: Tensor) -> Tensor:
    kernels = elementwise_kernels(hidden_states.device)
    if kernels is None or not kernels.takes_rows(hidden_states, norm.weight):
        return own(hidden_states)
    return kernels.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


def _gated_mlp(mlp: nn.Module, own: Callable, x: Tensor) -> Tensor:
    activation, kernels = kernel_activation(mlp.act_fn), elementwise_kernels(x.device)
    if activation is None or kernels is None or not kernels.takes_rows(x):
        return own(x)
    outputs = {mlp.gate_proj: mlp.gate_proj(x), mlp.up_proj: mlp.up_proj(x)}
    # The product overwrites one of the two outputs, unless a hook or a subclass may have kept it.
    free = (output for linear, output in outputs.items() if _is_plain(linear) and output.is_contiguous())
    product = kernels.gated_product(*outputs.values(), activation, out=next(free, None))
    return mlp.down_proj(product)


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and not linear._forward_hooks


def _attention(attention: nn.Module, own: Callable, *args, **kwargs) -> object:
    """The module's own forward, copied with other globals, in which `apply_rotary_pos_emb` is a kernel's."""
    forward = type(attention).forward
    rotary = {ROTARY: partial(_rotary, forward.__globals__[ROTARY])}
    closure = forward.__closure__
    twin = FunctionType(
        forward.__code__, forward.__globals__ | rotary, forward.__name__, forward.__defaults__, closure
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    return twin(attention, *args, **kwargs)


def _rotary(own: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    kernels = None if kwargs else elementwise_kernels(q.device)
    if kernels is None or not all(kernels.rotates(each, cos, sin) for each in (q, k)):
        return own(q, k, cos, sin, **kwargs)
    return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)


def _fusion(kind: type[nn.Module]) -> Callable | None:
    """The replacement for a class's forward, or None.

    Looked up on every call, so a user's monkey patch of the model file takes effect.
    """
    # Imported here because it takes seconds.
    from transformers.models.llama import modeling_llama as llama

    fusions = {llama.LlamaRMSNorm: _rms_norm, llama.LlamaMLP: _gated_mlp}
    whole = next((fused for model, fused in fusions.items() if _is_llamas(kind.forward, model.forward)), None)
    return whole or (_attention if _rotates_as(llama.apply_rotary_pos_emb, kind.forward) else None)


def _rotates_as(llamas: Callable, forward: Callable) -> bool:
    """Whether a forward calls a rotary embedding by Llama's name, and the code of that is Llama's."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return False
    rotary = forward.__globals__.get(ROTARY) if ROTARY in forward.__code__.co_names else None
    if rotary is None or not _is_llamas(rotary, llamas):
        return False
    return _is_llamas(*(inspect.unwrap(each).__globals__["rotate_half"] for each in (rotary, llamas)))


def _is_llamas(function: Callable, llamas: Callable) -> bool:
    """Whether a function has the same code as Llama's, which must not be a monkey patch itself."""
    from transformers.models.llama import modeling_llama as llama

    as_written = inspect.unwrap(llamas).__code__.co_filename == llama.__file__
    return as_written and _code(function) == _code(llamas)


def _code(function: Callable) -> tuple:
    """The compiled code of a function, without its docstring: equal if the source is."""
    function = inspect.unwrap(function)
    code = function.__code__
    constants = [constant for constant in code.co_consts if constant != function.__doc__]
    return code.co_code, code.co_names, constants, code.co_varnames
