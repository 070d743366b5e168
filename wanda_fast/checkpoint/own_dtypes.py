"""Each tensor of a checkpoint keeps its own dtype in the output; a value that stays keeps its bits.

A model is read and computed in one dtype. If that cannot hold the values of a tensor, such as an fp32 norm of
a bf16 checkpoint or a float64 weight, the tensor is read again when it is written.
"""

import torch
from torch import Tensor


def holds(wider: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether every value of `dtype` is one of `wider`."""
    return torch.promote_types(wider, dtype) == wider


def update_dtype(own: torch.dtype, read_as: torch.dtype) -> torch.dtype:
    """The dtype to which updated weights are rounded: both that of the file and that of the model hold it."""
    return own if holds(read_as, own) else read_as


def pruned_original(original: Tensor, read_as: torch.dtype, pruned: Tensor) -> Tensor:
    """A weight in the checkpoint's own dtype: `original` where it was kept, else the value of `pruned`.

    Args:
        original: the dense weight, on the device of `pruned`.
        read_as: the dtype to which it was converted before it was pruned.
        pruned: the weight after pruning, with zeros and perhaps updated values, in any floating-point dtype.
    """
    kept = (original.to(read_as).to(pruned.dtype) == pruned) & (pruned != 0)
    return torch.where(kept, original, pruned.to(original.dtype))
