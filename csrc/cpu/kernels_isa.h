// Compiles every kernel for one instruction set. Each kernels_*.cpp includes its simd_*.h and then this file.
#pragma once

#include "activate.h"
#include "activate_gated.h"
#include "add_sq_norm.h"
#include "admm_step.h"
#include "all_finite.h"
#include "count_zeros.h"
#include "forward.h"
#include "polish_step.h"
#include "prune_matrix.h"
#include "prune_nm.h"
#include "prune_rows.h"
#include "prune_variant.h"
#include "refine_groups.h"
#include "refine_swaps.h"
#include "sparsegpt_block.h"
#include "strided_rows.h"

namespace WANDA_ISA {

constexpr wanda::cpu::Kernels kernels_named(const char* name) {
  return {
      .name = name,
      .prune_rows = prune_rows,
      .prune_nm = prune_nm,
      .count_keys = count_keys,
      .prune_at_most = prune_at_most,
      .mark_at_most = mark_at_most,
      .find_variant = find_variant,
      .sparsegpt_block = sparsegpt_block,
      .admm_step = admm_step,
      .polish_step = polish_step,
      .refine_groups = refine_groups,
      .refine_swaps = refine_swaps,
      .add_sq_norm = add_sq_norm,
      .activate = activate,
      .activate_gated = activate_gated,
      .all_finite = all_finite,
      .count_zeros = count_zeros,
      .rms_norm = rms_norm,
      .gated_product = gated_product,
      .copy_elements = copy_elements,
      .rotate = rotate,
  };
}

}  // namespace WANDA_ISA
