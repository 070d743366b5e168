"""acc[i, j] += sum over tokens of x[t, i] * x[t, j]."""

from torch import Tensor


def add_hessian_(acc: Tensor, x: Tensor) -> None:
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    product = x.t() @ x
    # a matmul's rounding need not be symmetric
    acc += (product + product.t()) / 2
