"""Operations for one-shot pruning: statistics of activations, and selections that zero weights in place.

The package knows tensors, not models. The names below are its interface; `wanda_kernels.forward` is a second
one, with kernels for a block's forward. `help(wanda_kernels.prune_nm_)` documents an operation completely.
"""

# Registers the operations with torch.
import wanda_kernels.dispatch.torch_ops  # noqa: F401
from wanda_kernels.dispatch.backends import OPERATIONS, BackendError, choose_backend
from wanda_kernels.dispatch.checks import count_zeros, first_not_finite, require_finite
from wanda_kernels.doctor import diagnose
from wanda_kernels.hessian_factor import Factor, NotPositiveDefiniteError, factor_hessian
from wanda_kernels.host_hessian import add_hessian_on_host_, host_hessian_bytes
from wanda_kernels.mask_bits import PackedRows, pack_bits, pack_rows, unpack_bits
from wanda_kernels.operations.admm import POLISH_STEPS, RUNGS, Ladder, admm_, damped_hessian
from wanda_kernels.operations.packed import PACKED_LINEAR_ROWS, packed_linear, unpack_rows
from wanda_kernels.operations.selection import prune_matrix_, prune_nm_, prune_rows_, prune_variant_
from wanda_kernels.operations.solver import admm_step_, polish_, refine_mask_
from wanda_kernels.operations.sparsegpt import sparsegpt_
from wanda_kernels.operations.statistics import (
    add_coactivation_,
    add_gated_coactivation_,
    add_hessian_,
    add_sq_norm_,
)

__all__ = [
    "OPERATIONS",
    "PACKED_LINEAR_ROWS",
    "POLISH_STEPS",
    "RUNGS",
    "BackendError",
    "Factor",
    "Ladder",
    "NotPositiveDefiniteError",
    "PackedRows",
    "add_coactivation_",
    "add_gated_coactivation_",
    "add_hessian_",
    "add_hessian_on_host_",
    "add_sq_norm_",
    "admm_",
    "admm_step_",
    "choose_backend",
    "count_zeros",
    "damped_hessian",
    "diagnose",
    "factor_hessian",
    "first_not_finite",
    "host_hessian_bytes",
    "pack_bits",
    "pack_rows",
    "packed_linear",
    "polish_",
    "prune_matrix_",
    "prune_nm_",
    "prune_rows_",
    "prune_variant_",
    "refine_mask_",
    "require_finite",
    "sparsegpt_",
    "unpack_bits",
    "unpack_rows",
]
