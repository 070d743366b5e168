"""acc[j] += sum over tokens of x[t, j]^2; with offsets, acc[e, j] += the same over expert e's tokens."""

from torch import Tensor

from wanda_kernels.reference.segments import segments


def add_sq_norm_(acc: Tensor, x: Tensor, offsets: Tensor | None = None) -> None:
    if offsets is not None:
        for sums, tokens in zip(acc, segments(x, offsets), strict=True):
            add_sq_norm_(sums, tokens)
        return
    x = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
    acc += x.square().sum(dim=0)
