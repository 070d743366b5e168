// Whether a matrix holds no NaN, no infinity and, for a statistic, no negative number. A row is read to its end, so
// that the loop is a plain vector reduction. NaN and infinity are the values whose exponent bits are all set.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

// A number that is not NaN is negative if its bits, as an unsigned integer, exceed those of -0.0.
template <typename Bits>
bool is_good_row(const Bits* bits, int64_t n, Bits exponent, bool non_negative) {
  constexpr Bits kHighest = static_cast<Bits>(-1);
  const Bits limit = non_negative ? static_cast<Bits>(kHighest / 2 + 1) : kHighest;
  Bits bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<Bits>(((bits[i] & exponent) == exponent) | (bits[i] > limit));
  return bad == 0;
}

inline bool is_good_row(const Matrix& x, int64_t row, bool non_negative) {
  switch (x.dtype) {
    case DType::kFloat: return is_good_row<uint32_t>(row_of<uint32_t>(x, row), x.n_cols, 0x7f800000, non_negative);
    case DType::kHalf: return is_good_row<uint16_t>(row_of<uint16_t>(x, row), x.n_cols, 0x7c00, non_negative);
    case DType::kBFloat: return is_good_row<uint16_t>(row_of<uint16_t>(x, row), x.n_cols, 0x7f80, non_negative);
  }
  return false;
}

inline bool all_finite(const Matrix& x, bool non_negative, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!is_good_row(x, row, non_negative)) return false;
  }
  return true;
}

}  // namespace WANDA_ISA
