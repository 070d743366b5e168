"""A Hessian too wide for the GPU: kept in host memory, its sums computed where the tokens are.

Rows of it visit the GPU, BAND bytes at once. A GPU takes less time for the sums than the bands for their way,
and hundreds of times less than the host would.
"""

from torch import Tensor

from wanda_kernels.dispatch.precision import in_full_precision
from wanda_kernels.fp32_sums import MOST_TOKENS, add_product_, addmm_adds_to_fp32
from wanda_kernels.native.ops import as_rows

BAND = 2**28


@in_full_precision
def add_hessian_on_host_(acc: Tensor, x: Tensor) -> None:
    """As `add_hessian_`, but for acc `[in, in]` on the host, pinned where x is on a GPU.

    The bands are on their way back when it returns: what x's device was given must be done before the host
    reads acc.
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


def band_bytes(in_features: int) -> int:
    """What it takes of the GPU."""
    square = 4 * in_features**2
    return min(square, max(BAND, 4 * in_features))
