"""Tokens sorted by expert: rows offsets[e] to offsets[e + 1] - 1 of a matrix are those of expert e.

Only the kernels read offsets, so the host does not wait for the GPU.
"""

import triton
import triton.language as tl


@triton.jit
def segment(offsets_ptr, expert, n_tokens):
    """(first row, end) of an expert; offsets out of range are clamped, since nothing has checked them."""
    first = tl.maximum(tl.load(offsets_ptr + expert), 0).to(tl.int32)
    end = tl.minimum(tl.load(offsets_ptr + expert + 1), n_tokens).to(tl.int32)
    return first, end
