"""What the kernels of packed rows share: the values of a tile in their columns.

The value of a column is preceded in its row by as many values as there are bits before the column's own. A
running sum of a tile's bits, and the number of values before the tile, give that for all columns at once.
"""

import triton
import triton.language as tl

# 8 columns a thread
TILE = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}


@triton.jit
def first_values(offsets_ptr, rows, mask_m, row_values, HAS_OFFSETS: tl.constexpr):
    """Where the values of rows begin, int64 [BLOCK_M]."""
    if HAS_OFFSETS:
        first = tl.load(offsets_ptr + rows, mask=mask_m, other=0)
    else:
        first = rows * row_values
    return first


@triton.jit
def expand(bits_ptr, n_bytes, values_ptr, n_values, rows, cols, inside, first):
    """(values of a tile, which columns have one, where the values behind the tile begin).

    A column without a value gets 0. Nothing outside of `values` is read, whatever bits and offsets are.
    """
    in_bytes = tl.load(bits_ptr + rows[:, None] * n_bytes + (cols // 8)[None, :], mask=inside, other=0)
    bits = (in_bytes.to(tl.int32) >> (cols % 8)[None, :]) & 1  # [BLOCK_M, BLOCK_N]
    places = first[:, None] + (tl.cumsum(bits, axis=1) - bits)
    has_value = bits != 0
    readable = has_value & (places >= 0) & (places < n_values)
    values = tl.load(values_ptr + places, mask=readable, other=0)
    return values, has_value, first + tl.sum(bits, axis=1)
