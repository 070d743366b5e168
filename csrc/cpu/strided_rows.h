// Copies elements between rows whose columns lie apart and contiguous rows: a transpose, if the rows are neighbours.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

using wanda::Elements;

inline Simd::Float load_raw(const uint32_t* p) { return Simd::load(reinterpret_cast<const float*>(p)); }
inline Simd::Float load_raw(const uint16_t* p) { return Simd::load(reinterpret_cast<const BFloat*>(p)); }
inline void store_raw(uint32_t* p, Simd::Float v) { Simd::store(reinterpret_cast<float*>(p), v); }
inline void store_raw(uint16_t* p, Simd::Float v) { Simd::store_high_words(p, v); }

// Element i of vector j becomes element j of vector i, for kWidth vectors. No bit of an element changes.
template <typename Bits>
void transpose_square(const Bits* from, int64_t from_step, Bits* to, int64_t to_step) {
  Simd::Float v[kWidth];
  for (int i = 0; i < kWidth; ++i) v[i] = load_raw(from + i * from_step);
  Simd::transpose(v);
  for (int i = 0; i < kWidth; ++i) store_raw(to + i * to_step, v[i]);
}

template <typename Bits>
void copy_elements_of(const Elements& from, const Elements& to, int64_t n_rows, int64_t n_cols) {
  const bool gathers = from.row_stride == 1 && to.col_stride == 1;
  const bool scatters = from.col_stride == 1 && to.row_stride == 1;
  const int64_t from_step = gathers ? from.col_stride : from.row_stride;
  const int64_t to_step = gathers ? to.row_stride : to.col_stride;
  // All rows of some columns come first, since they share cache lines.
  for (int64_t col = 0; col < n_cols; col += kWidth) {
    for (int64_t row = 0; row < n_rows; row += kWidth) {
      const Bits* source = static_cast<const Bits*>(from.data) + row * from.row_stride + col * from.col_stride;
      Bits* target = static_cast<Bits*>(to.data) + row * to.row_stride + col * to.col_stride;
      const int64_t height = smaller<int64_t>(kWidth, n_rows - row), width = smaller<int64_t>(kWidth, n_cols - col);
      if ((gathers || scatters) && height == kWidth && width == kWidth) {
        transpose_square(source, from_step, target, to_step);
        continue;
      }
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          target[i * to.row_stride + j * to.col_stride] = source[i * from.row_stride + j * from.col_stride];
        }
      }
    }
  }
}

inline void copy_elements(const Elements& from, const Elements& to, int64_t n_rows, int64_t n_cols, bool is_wide) {
  is_wide ? copy_elements_of<uint32_t>(from, to, n_rows, n_cols) : copy_elements_of<uint16_t>(from, to, n_rows, n_cols);
}

}  // namespace WANDA_ISA
