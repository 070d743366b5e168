// The number of elements that are +0.0 or -0.0.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

// A zero has no bit set except the sign. A row's count fits 32 bits, and 32-bit sums fill a vector better.
template <typename Bits>
int64_t zeros_of_row(const Bits* bits, int64_t n) {
  uint32_t n_zeros = 0;
  for (int64_t i = 0; i < n; ++i) n_zeros += static_cast<Bits>(bits[i] << 1) == 0;
  return n_zeros;
}

inline int64_t count_zeros(const Matrix& x, int64_t begin, int64_t end) {
  int64_t n_zeros = 0;
  for (int64_t row = begin; row < end; ++row) {
    n_zeros += x.dtype == DType::kFloat ? zeros_of_row(row_of<uint32_t>(x, row), x.n_cols)
                                        : zeros_of_row(row_of<uint16_t>(x, row), x.n_cols);
  }
  return n_zeros;
}

}  // namespace WANDA_ISA
