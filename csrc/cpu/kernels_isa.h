// Included by one file for each instruction set, after its simd_*.h: compiles every kernel for it.
#pragma once

#include "activate.h"
#include "activate_gated.h"
#include "add_sq_norm.h"
#include "all_finite.h"
#include "count_zeros.h"
#include "forward.h"
#include "prune_and_update.h"
#include "prune_matrix.h"
#include "prune_nm.h"
#include "prune_rows.h"
#include "prune_variant.h"

namespace WANDA_ISA {

constexpr wanda::cpu::Kernels kernels_named(const char* name) {
  return {name,         prune_rows,       prune_nm,     count_keys,  prune_at_most,
          mark_at_most, prune_and_update, find_variant, add_sq_norm, activate,
          activate_gated, all_finite, count_zeros, rms_norm,  gated_product, rotate};
}

}  // namespace WANDA_ISA
