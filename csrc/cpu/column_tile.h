// Moves kWidth rows of a block into columns of vectors and back, so that each lane of a vector holds one row.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

constexpr int kTileColumns = wanda::cpu::kMaxBlock;

inline Simd::Float load_part(const float* p, int64_t n) {
  if (n >= kWidth) return Simd::load(p);
  float padded[kWidth] = {};
  memcpy(padded, p, n * sizeof(float));
  return Simd::load(padded);
}

inline Simd::Float load_part(const uint8_t* p, int64_t n) {
  if (n >= kWidth) return Simd::as_float(Simd::load_bytes(p));
  uint8_t padded[kWidth] = {};
  memcpy(padded, p, n);
  return Simd::as_float(Simd::load_bytes(padded));
}

inline void store_part(float* p, Simd::Float v, int64_t n) {
  if (n >= kWidth) return Simd::store(p, v);
  float padded[kWidth];
  Simd::store(padded, v);
  memcpy(p, padded, n * sizeof(float));
}

inline void store_part(uint8_t* p, Simd::Float v, int64_t n) {
  if (n >= kWidth) return Simd::store_bytes(p, Simd::bits(v));
  uint8_t padded[kWidth];
  Simd::store_bytes(padded, Simd::bits(v));
  memcpy(p, padded, n);
}

// Transposes [n_rows, n_cols], n_rows at most kWidth, into columns of vectors. Missing rows become zeros.
template <typename T>
void rows_to_columns(const T* rows, int64_t stride, int64_t n_rows, int64_t n_cols, float* columns) {
  for (int64_t col = 0; col < n_cols; col += kWidth) {
    Simd::Float v[kWidth];
    for (int row = 0; row < kWidth; ++row) {
      v[row] = row < n_rows ? load_part(rows + row * stride + col, n_cols - col) : Simd::broadcast(0.0f);
    }
    Simd::transpose(v);
    for (int i = 0; i < kWidth; ++i) Simd::store(columns + (col + i) * kWidth, v[i]);
  }
}

template <typename T>
void columns_to_rows(const float* columns, int64_t n_rows, int64_t n_cols, T* rows, int64_t stride) {
  for (int64_t col = 0; col < n_cols; col += kWidth) {
    Simd::Float v[kWidth];
    for (int i = 0; i < kWidth; ++i) v[i] = Simd::load(columns + (col + i) * kWidth);
    Simd::transpose(v);
    for (int64_t row = 0; row < n_rows; ++row) store_part(rows + row * stride + col, v[row], n_cols - col);
  }
}

}  // namespace WANDA_ISA
