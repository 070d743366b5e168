"""Keeps a pruned model's zeros while the model is fine-tuned."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from wanda_fast.errors import MaskError
from wanda_fast.model.architecture import find_blocks
from wanda_kernels import pack_bits, unpack_bits


class KeptZeros:
    """The zeros of a model's prunable weights, as one bit a weight: see `keep_zeros`."""

    def __init__(self, model: nn.Module):
        names = {linear.parameter for block in find_blocks(model) for linear in block.linears}
        parameters = {id(each): each for each in map(model.get_parameter, sorted(names))}
        held = [parameter for parameter in parameters.values() if not parameter.detach().all()]
        if not held:
            raise MaskError(
                f"{type(model).__name__} has no zeros in its {len(names)} prunable parameters: prune it "
                f"before it is fine-tuned"
            )
        self._bits = [(each, pack_bits(_rows(each.detach()).ne(0))) for each in held]
        self._contexts: list[ExitStack] = []

    @torch.no_grad()
    def apply(self) -> None:
        """Set the weights that were zero to zero again, and their gradients."""
        for parameter, bits in self._bits:
            pruned = _pruned(parameter, bits)
            parameter.masked_fill_(pruned, 0.0)
            if parameter.grad is not None:
                parameter.grad.masked_fill_(pruned, 0.0)

    def __enter__(self) -> "KeptZeros":
        with ExitStack() as hooks:
            for parameter, bits in self._bits:
                if parameter.requires_grad:
                    hooks.enter_context(_masked_gradient(parameter, bits))
            step_hook = register_optimizer_step_post_hook(lambda *_: self.apply())
            hooks.callback(step_hook.remove)
            self._contexts.append(hooks.pop_all())
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.pop().close()

    def callback(self) -> object:
        """A `TrainerCallback` of transformers that enters this context for the training."""
        from transformers import TrainerCallback

        kept = self

        class KeepZeros(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                kept.__enter__()

            def on_step_end(self, args, state, control, **kwargs):
                # For optimizers that are not torch's, whose steps call no hook.
                kept.apply()

            def on_train_end(self, args, state, control, **kwargs):
                kept.__exit__()

        return KeepZeros()


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Keep the zeros of a pruned model while it is fine-tuned.

    A context manager, inside of which the weights that are zero now have no gradient, and are set to zero
    after every step of a torch optimizer, which may be made before or inside:

        with wanda_fast.keep_zeros(model):
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    For transformers' Trainer: `Trainer(..., callbacks=[wanda_fast.keep_zeros(model).callback()])`. In a loop
    whose optimizer is not torch's, call `apply()` of the returned object after each step.

    Args:
        model: a pruned model in memory, in any floating-point dtype, whole on each device: parameters that
            FSDP or DeepSpeed have sharded are not known by their names.
    Returns: the context manager. It takes one bit of memory a prunable weight, and for a moment a few bytes
        for each weight of one parameter.
    Raises: `MaskError` if no prunable weight is zero; `NoPrunableBlockError`.
    """
    return KeptZeros(model)


def _rows(parameter: Tensor) -> Tensor:
    """A matrix or a stack of matrices; a 1x1 convolution is a matrix."""
    return parameter.flatten(1) if parameter.dim() > 3 else parameter


def _pruned(parameter: Tensor, bits: Tensor) -> Tensor:
    kept = unpack_bits(bits.to(parameter.device), _rows(parameter).shape[-1])
    return ~kept.view(parameter.shape)


@contextmanager
def _masked_gradient(parameter: nn.Parameter, bits: Tensor) -> Iterator[None]:
    """Context in which a gradient is zero where the weight is, before its norm is clipped."""
    hook = parameter.register_hook(lambda gradient: gradient.masked_fill(_pruned(parameter, bits), 0.0))
    try:
        yield
    finally:
        hook.remove()
