"""acc[j] += sum over tokens of x[t, j]^2."""

from torch import Tensor


def add_sq_norm_(acc: Tensor, x: Tensor) -> None:
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    acc += x.square().sum(dim=0)
