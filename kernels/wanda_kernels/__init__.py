"""Operations for one-shot pruning: activation statistics and in-place selection.

A leaf: it knows tensors, not models.
"""

from wanda_kernels.dispatch.backends import BackendError
from wanda_kernels.dispatch.checks import first_not_finite, require_finite
from wanda_kernels.dispatch.zeros import count_zeros
from wanda_kernels.hessian_factor import Factor, NotPositiveDefiniteError, factor_hessian
from wanda_kernels.operations import (
    add_coactivation_,
    add_gated_coactivation_,
    add_hessian_,
    add_sq_norm_,
    prune_matrix_,
    prune_nm_,
    prune_rows_,
    prune_variant_,
    sparsegpt_,
)
from wanda_kernels.reference.ops import pack_bits, unpack_bits

__all__ = [
    "BackendError",
    "Factor",
    "NotPositiveDefiniteError",
    "add_coactivation_",
    "add_hessian_",
    "add_gated_coactivation_",
    "add_sq_norm_",
    "count_zeros",
    "factor_hessian",
    "first_not_finite",
    "pack_bits",
    "prune_matrix_",
    "prune_nm_",
    "prune_rows_",
    "prune_variant_",
    "require_finite",
    "sparsegpt_",
    "unpack_bits",
]
