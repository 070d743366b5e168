"""How sparse a tensor is."""

import torch
from torch import Tensor

from wanda_kernels.native import ops as native


def count_zeros(tensor: Tensor) -> Tensor:
    """How many elements are +0.0 or -0.0: int64 `[]` on the tensor's device, which nobody waits for."""
    if native.reads(tensor):
        return torch.tensor(native.count_zeros(tensor))
    return tensor.numel() - tensor.count_nonzero()  # a sum of bools would copy them as int64
