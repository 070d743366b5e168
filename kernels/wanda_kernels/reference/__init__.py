"""Every operation in plain torch, vectorised, on any device. It defines the right result.

The other backends give the same masks bit for bit. Sums over tokens may differ in their last bits.
"""

from wanda_kernels.reference.activations import ACTIVATIONS, GATE_EFFECTS
from wanda_kernels.reference.add_coactivation import add_coactivation_
from wanda_kernels.reference.add_gated_coactivation import add_gated_coactivation_
from wanda_kernels.reference.add_hessian import add_hessian_
from wanda_kernels.reference.add_sq_norm import add_sq_norm_
from wanda_kernels.reference.admm_step import admm_step_
from wanda_kernels.reference.packed_linear import packed_linear
from wanda_kernels.reference.polish_step import polish_
from wanda_kernels.reference.prune_matrix import prune_matrix_
from wanda_kernels.reference.prune_nm import prune_nm_
from wanda_kernels.reference.prune_rows import prune_rows_
from wanda_kernels.reference.prune_variant import fraction_bits, prune_variant_
from wanda_kernels.reference.refine_mask import refine_mask_
from wanda_kernels.reference.scores import score, zero_
from wanda_kernels.reference.sparsegpt_block import sparsegpt_
from wanda_kernels.reference.unpack_rows import unpack_rows

__all__ = [
    "ACTIVATIONS",
    "GATE_EFFECTS",
    "add_coactivation_",
    "add_gated_coactivation_",
    "add_hessian_",
    "add_sq_norm_",
    "admm_step_",
    "fraction_bits",
    "packed_linear",
    "polish_",
    "prune_matrix_",
    "prune_nm_",
    "prune_rows_",
    "prune_variant_",
    "refine_mask_",
    "score",
    "sparsegpt_",
    "unpack_rows",
    "zero_",
]
