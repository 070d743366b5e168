"""The shapes of an image's hidden states, from a forward on the meta device, which computes nothing."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Size, nn

from wanda_fast.errors import CalibrationError, HiddenStatesError
from wanda_fast.model.architecture import Block


@dataclass
class ImageShapes:
    """`hidden`: of one image, at the first block of each chain; `classes`: how many logits it gets."""

    hidden: list[Size]
    classes: int

    @property
    def tokens(self) -> int:
        """Positions of the hidden states that have the most."""
        return max(shape.numel() // min(shape) if len(shape) > 2 else shape[0] for shape in self.hidden)

    @property
    def values(self) -> int:
        """Values of the hidden states of two chains that exist at the same time."""
        pairs = zip(self.hidden, self.hidden[1:] or [Size([0])], strict=False)
        return max(first.numel() + second.numel() for first, second in pairs)


@torch.no_grad()
def image_shapes(model: nn.Module, blocks: list[Block], image: Size) -> ImageShapes:
    """The shapes for images `[3, height, width]`.

    Raises: `CalibrationError` if the model does not take such images; `HiddenStatesError` if a block's output
        has another shape than its input, as in most convolutional networks.
    """
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    state = {name: tensor.to("meta") for name, tensor in state.items()}
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    seen: dict[int, Size] = {}
    handles = [
        block.module.register_forward_hook(partial(_note, seen, block), with_kwargs=True) for block in blocks
    ]
    try:
        output = torch.func.functional_call(model, state, torch.empty(1, *image, dtype=dtype, device="meta"))
    except HiddenStatesError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CalibrationError(
            f"{type(model).__name__} does not take images [3, height, width] = {list(image)}: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return ImageShapes(list(seen.values()), getattr(output, "logits", output).shape[-1])


def _note(
    seen: dict[int, Size], block: Block, _module: nn.Module, args: tuple, kwargs: dict, output: object
) -> None:
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple | list) else output
    if before.shape != after.shape:
        raise HiddenStatesError(
            f"{block.name} makes {list(after.shape[1:])} of hidden states {list(before.shape[1:])}: only "
            f"blocks that keep the shape run one by one; magnitude runs none"
        )
    seen.setdefault(block.chain, before.shape[1:])
