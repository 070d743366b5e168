"""RMSNorm, the gated MLP's product and the rotary embedding by one kernel each, where a model's own code for
them is Llama's word for word.

Transformers writes these out once for every model, so that the compiled code tells whether a class means the
same: Mistral's and Qwen's do, Gemma's norm does not.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType

from torch import Tensor, nn

from wanda_fast.model.activation_names import kernel_activation
from wanda_fast.model.block_forward import elementwise_kernels
from wanda_fast.model.patching import forwards_replaced

ROTARY = "apply_rotary_pos_emb"  # the name that attentions call


@contextmanager
def fused_modules(block: nn.Module) -> Iterator[None]:
    """Inside, the block's norms, MLPs and rotary embeddings run by kernels, on operands that these take."""
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
    # The product lies in the memory of one of them: of one that nobody else was given.
    free = (output for linear, output in outputs.items() if _is_plain(linear) and output.is_contiguous())
    product = kernels.gated_product(*outputs.values(), activation, out=next(free, None))
    return mlp.down_proj(product)


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and not linear._forward_hooks


def _attention(attention: nn.Module, own: Callable, *args, **kwargs) -> object:
    """The module's own forward, for which `apply_rotary_pos_emb` is a kernel's."""
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
    """Asked anew each time: whoever puts a function of his own in a model's file has his called."""
    from transformers.models.llama import modeling_llama as llama  # seconds of start-up

    fusions = {llama.LlamaRMSNorm: _rms_norm, llama.LlamaMLP: _gated_mlp}
    whole = next((fused for model, fused in fusions.items() if _is_llamas(kind.forward, model.forward)), None)
    return whole or (_attention if _rotates_as(llama.apply_rotary_pos_emb, kind.forward) else None)


def _rotates_as(llamas: Callable, forward: Callable) -> bool:
    """Whether a forward, a plain function, calls a rotary embedding of Llama's code by Llama's name."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return False
    rotary = forward.__globals__.get(ROTARY) if ROTARY in forward.__code__.co_names else None
    if rotary is None or not _is_llamas(rotary, llamas):
        return False
    return _is_llamas(*(inspect.unwrap(each).__globals__["rotate_half"] for each in (rotary, llamas)))


def _is_llamas(function: Callable, llamas: Callable) -> bool:
    """Whether a function's code is that of Llama's, and that still is the one in Llama's own file."""
    from transformers.models.llama import modeling_llama as llama

    as_written = inspect.unwrap(llamas).__code__.co_filename == llama.__file__
    return as_written and _code(function) == _code(llamas)


def _code(function: Callable) -> tuple:
    """What a function does: equal for equal source, whatever its documentation."""
    function = inspect.unwrap(function)
    code = function.__code__
    constants = [constant for constant in code.co_consts if constant != function.__doc__]
    return code.co_code, code.co_names, constants, code.co_varnames
