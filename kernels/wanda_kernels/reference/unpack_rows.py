"""The weight of packed rows in plain torch. `operations/packed.py` documents the arguments."""

from torch import Tensor

from wanda_kernels.mask_bits import as_integers, unpack_bits


def unpack_rows(out: Tensor, bits: Tensor, values: Tensor, offsets: Tensor | None) -> None:
    if offsets is not None:
        values = values[int(offsets[0]) :]
    kept = unpack_bits(bits, out.shape[-1])
    as_integers(out).zero_().masked_scatter_(kept, as_integers(values))
