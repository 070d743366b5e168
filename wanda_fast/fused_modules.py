"""RMSNorm and the gated MLP's product by one kernel each, in modules whose own code is Llama's word for word.

Transformers writes these modules out once for every model, so that the compiled code tells whether a class
means the same: Mistral's and Qwen's do, Gemma's norm does not.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

from torch import Tensor, nn

from wanda_fast.block_forward import may_replace
from wanda_fast.coactivation import kernel_activation
from wanda_kernels import native_forward


@contextmanager
def fused_modules(block: nn.Module) -> Iterator[None]:
    """Inside, the block's norms and MLPs run by kernels, on operands that these take."""
    modules = block.modules() if may_replace() else ()
    fused = [module for module in modules if _fusion(type(module)) and "forward" not in vars(module)]
    for module in fused:
        module.forward = partial(_fusion(type(module)), module, module.forward)
    try:
        yield
    finally:
        for module in fused:
            del module.forward


def _rms_norm(norm: nn.Module, own: Callable, hidden_states: Tensor) -> Tensor:
    if not native_forward.takes_rows(hidden_states, norm.weight):
        return own(hidden_states)
    return native_forward.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


def _gated_mlp(mlp: nn.Module, own: Callable, x: Tensor) -> Tensor:
    activation = kernel_activation(mlp.act_fn)
    if activation is None or not native_forward.takes_rows(x):
        return own(x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    # Fresh memory costs more than the product: the gate's serves again where nobody else can hold it.
    own_gate = type(mlp.gate_proj) is nn.Linear and not mlp.gate_proj._forward_hooks
    return mlp.down_proj(native_forward.gated_product(gate, up, activation, in_place=own_gate))


@cache
def _fusion(kind: type[nn.Module]) -> Callable | None:
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm  # seconds of start-up

    fusions = {LlamaRMSNorm: _rms_norm, LlamaMLP: _gated_mlp}
    return next((fused for model, fused in fusions.items() if _code(kind) == _code(model)), None)


def _code(kind: type[nn.Module]) -> tuple:
    """What a class's forward does: equal for equal source."""
    code = inspect.unwrap(kind.forward).__code__
    return code.co_code, code.co_names, code.co_consts, code.co_varnames
