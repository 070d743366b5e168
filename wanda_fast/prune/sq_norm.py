"""The squared norm of a linear's input: what wanda's score takes the root of."""

import torch
from torch import Tensor

import wanda_kernels
from wanda_fast.model.architecture import Linear
from wanda_kernels.forward import saved_column_squares


class SquaredNorm:
    """acc[j] = sum over tokens of x[t, j]^2, fp32 `[in]`."""

    operation = "add_sq_norm_"

    def __init__(self, linear: Linear):
        self.acc = torch.zeros(linear.module.in_features, device=linear.module.weight.device)

    def add(self, x: Tensor) -> None:
        saved = saved_column_squares(x)
        if saved is None:
            wanda_kernels.add_sq_norm_(self.acc, x)
        else:
            self.acc += saved.sum(0)
