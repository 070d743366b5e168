// The verdict on a matrix: no NaN, no infinity, and for a statistic no negative number. One read, no early exit, so
// that the loop is a plain vector reduction; NaN and infinity are the values whose exponent bits are all set.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

template <typename Bits>
bool is_finite_row(const Bits* bits, int64_t n, Bits exponent) {
  Bits bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<Bits>((bits[i] & exponent) == exponent);
  return bad == 0;
}

inline bool has_negative(const float* values, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= values[i] < 0.0f;
  return bad != 0;
}

inline bool all_finite(const Matrix& x, bool non_negative, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    bool finite = false;
    switch (x.dtype) {
      case DType::kFloat: finite = is_finite_row<uint32_t>(row_of<uint32_t>(x, row), x.n_cols, 0x7f800000); break;
      case DType::kHalf: finite = is_finite_row<uint16_t>(row_of<uint16_t>(x, row), x.n_cols, 0x7c00); break;
      case DType::kBFloat: finite = is_finite_row<uint16_t>(row_of<uint16_t>(x, row), x.n_cols, 0x7f80); break;
    }
    if (!finite) return false;
    if (non_negative && x.dtype == DType::kFloat && has_negative(row_of<float>(x, row), x.n_cols)) return false;
  }
  return true;
}

}  // namespace WANDA_ISA
