"""A Hessian that is too wide for the GPU: it stays in host memory, and the GPU computes its sums.

Bands of its rows, BAND bytes each, visit the GPU. Copying a band takes the GPU longer than its sums; the host
would take hundreds of times longer for the sums.
"""

from torch import Tensor

from wanda_kernels.dispatch.precision import in_full_precision
from wanda_kernels.fp32_sums import MOST_TOKENS, add_product_, addmm_adds_to_fp32
from wanda_kernels.native.ops import as_rows

BAND = 2**28


@in_full_precision
def add_hessian_on_host_(acc: Tensor, x: Tensor) -> None:
    """acc[i, j] += sum over tokens of x[t, i] * x[t, j], for an acc in host memory.

    The copies back to the host are asynchronous: synchronise x's device before the host reads acc.

    Args:
        acc: fp32 `[in, in]`, contiguous, symmetric, on the CPU, in pinned memory if x is on a GPU; added
            to in place. Both triangles are filled.
        x: fp32, fp16 or bf16 `[..., in]`, on the device that computes; products are exact and sums fp32. The
            device needs `host_hessian_bytes(in)` bytes for the rows of acc that it holds.

    Raises: torch's own errors; the operands are not checked.
    Source: SparseGPT, arXiv 2301.00774, section 3.
    """
    x = as_rows(x)
    if not addmm_adds_to_fp32(x.device.type):
        x = x.float()
    n_rows = max(1, BAND // (4 * len(acc)))
    for first in range(0, len(acc), n_rows):
        band = acc[first : first + n_rows]
        here = band.to(x.device, non_blocking=True, copy=True)
        for tokens in x.split(MOST_TOKENS):
            add_product_(here, tokens[:, first : first + n_rows], tokens)
        band.copy_(here, non_blocking=True)


def host_hessian_bytes(in_features: int) -> int:
    """Bytes of GPU memory that `add_hessian_on_host_` takes for rows of a Hessian of in_features^2."""
    square = 4 * in_features**2
    return min(square, max(BAND, 4 * in_features))
