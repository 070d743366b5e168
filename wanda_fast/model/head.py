"""A causal language model in two parts: the hidden states after its blocks, and the logits that follow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wanda_fast.model.architecture import Block
from wanda_fast.model.block_forward import faster_forward
from wanda_fast.model.block_lists import classifies_images
from wanda_fast.model.fused_modules import fused_modules
from wanda_fast.model.recorder import blocks_skipped
from wanda_kernels.forward import reused_memory


@contextmanager
def fast_forwards(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which forwards of the whole model run by faster kernels, where there are some."""
    with torch.no_grad(), faster_forward(device), fused_modules(model), reused_memory():
        yield


def body(model: nn.Module) -> Callable[[Tensor], object]:
    """The model's own forward without its head, from token ids or images."""
    inner = getattr(model, "base_model", model)
    first = next(p for p in inner.parameters() if not p.is_meta)
    device, dtype = first.device, first.dtype
    if classifies_images(model):
        return lambda images: inner(images.to(device, dtype))
    return lambda ids: inner(input_ids=ids.to(device), use_cache=False)


def last_hidden(model: nn.Module, blocks: list[Block], ids: Tensor) -> Tensor:
    """The last block's output for token ids `[nwindows, seqlen]`."""
    outputs = []
    hook = blocks[-1].module.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    try:
        body(model)(ids)
    finally:
        hook.remove()
    return outputs[-1][0] if isinstance(outputs[-1], tuple | list) else outputs[-1]


def logits_after(model: nn.Module, blocks: list[Block], ids: Tensor, hidden: Tensor) -> Tensor:
    """Final norm, head and soft-capping by the model's own code, in a forward that runs no block.

    Args:
        ids: the tokens whose hidden states these are; they set no value of the logits.
        hidden: the last block's output `[nwindows, tokens, features]`.
    """
    with blocks_skipped(blocks, hidden):
        return logits(model, ids)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of token ids `[nwindows, tokens]`, by the model's own forward."""
    options = {"use_cache": False}
    # A loss of the routers needs all blocks, which may be skipped.
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        options["output_router_logits"] = False
    return model(ids, **options).logits
