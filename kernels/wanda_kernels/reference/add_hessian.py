"""acc[i, j] += sum over tokens of x[t, i] * x[t, j]; with offsets, acc[e] += that over expert e's tokens."""

from torch import Tensor

from wanda_kernels.reference.segments import segments


def add_hessian_(acc: Tensor, x: Tensor, offsets: Tensor | None = None) -> None:
    if offsets is not None:
        for sums, tokens in zip(acc, segments(x, offsets), strict=True):
            add_hessian_(sums, tokens)
        return
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    product = x.t() @ x
    # a matmul's rounding need not be symmetric
    acc += (product + product.t()) / 2
