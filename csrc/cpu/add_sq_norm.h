// acc[j] += sum_t x[t, j]^2 for a range of columns. Reads x once, in order, four rows at a time: the prefetcher follows
// each row, and a sum is loaded and stored once for four squares.
// Sums are fp32 within a slab of tokens and fp64 over the slabs. Their order depends on the shape, not on the threads.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

constexpr int kRowsAtOnce = 4;

// sums[i] += the squares of `n_rows` rows, for columns [0, n_cols) of x.
template <int kRows, typename T>
void add_squares(const T* x, int64_t stride, int64_t n_cols, float* sums) {
  const int64_t whole = n_cols / kWidth * kWidth;
  for (int64_t col = 0; col < whole; col += kWidth) {
    Simd::Float sum = Simd::load(sums + col);
    for (int row = 0; row < kRows; ++row) sum = Simd::add_square(sum, Simd::load(x + row * stride + col));
    Simd::store(sums + col, sum);
  }
  for (int64_t col = whole; col < n_cols; ++col) {
    for (int row = 0; row < kRows; ++row) {
      const float value = to_float(x[row * stride + col]);
      sums[col] += value * value;
    }
  }
}

// sums[i] = the sum of squares of `n_rows` rows.
template <typename T>
void sum_slab(const T* x, int64_t n_rows, int64_t stride, int64_t n_cols, float* sums) {
  for (int64_t col = 0; col < n_cols; ++col) sums[col] = 0;
  int64_t row = 0;
  for (; row + kRowsAtOnce <= n_rows; row += kRowsAtOnce) {
    add_squares<kRowsAtOnce>(x + row * stride, stride, n_cols, sums);
  }
  for (; row < n_rows; ++row) add_squares<1>(x + row * stride, stride, n_cols, sums);
}

template <typename T>
void add_sq_norm_of(const T* x, int64_t n_rows, int64_t stride, int64_t n_cols, float* acc, void* memory) {
  double* total = static_cast<double*>(memory);
  float* slab = reinterpret_cast<float*>(total + n_cols);
  if (n_rows <= wanda::cpu::kSlabTokens) {
    sum_slab(x, n_rows, stride, n_cols, slab);
    for (int64_t col = 0; col < n_cols; ++col) acc[col] = static_cast<float>(acc[col] + static_cast<double>(slab[col]));
    return;
  }
  for (int64_t col = 0; col < n_cols; ++col) total[col] = 0;
  for (int64_t first = 0; first < n_rows; first += wanda::cpu::kSlabTokens) {
    const int64_t last = smaller(n_rows, first + wanda::cpu::kSlabTokens);
    sum_slab(x + first * stride, last - first, stride, n_cols, slab);
    for (int64_t col = 0; col < n_cols; ++col) total[col] += slab[col];
  }
  for (int64_t col = 0; col < n_cols; ++col) acc[col] = static_cast<float>(acc[col] + total[col]);
}

inline void add_sq_norm(const Matrix& x, float* acc, int64_t begin, int64_t end, void* memory) {
  const int64_t n_cols = end - begin;
  switch (x.dtype) {
    case DType::kFloat:
      return add_sq_norm_of(row_of<float>(x, 0) + begin, x.n_rows, x.stride, n_cols, acc + begin, memory);
    case DType::kHalf:
      return add_sq_norm_of(row_of<Half>(x, 0) + begin, x.n_rows, x.stride, n_cols, acc + begin, memory);
    case DType::kBFloat:
      return add_sq_norm_of(row_of<BFloat>(x, 0) + begin, x.n_rows, x.stride, n_cols, acc + begin, memory);
  }
}

}  // namespace WANDA_ISA
