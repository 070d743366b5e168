// c += (now - before) h, for matrices that differ in few elements: each difference costs one row of h.
//
// The rows of h are taken in chunks that stay in L2, and all rows of c pass over a chunk. Up to 8 vectors of c stay in
// registers meanwhile.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

using wanda::Changes;

constexpr int64_t kChunkRows = 256;

// The differences between two rows.
struct Differences {
  float by[kChunkRows];
  int64_t at[kChunkRows];
  int64_t count;

  Differences(const float* now, const float* before, int64_t n) : count(0) {
    for (int64_t i = 0; i < n; ++i) {
      by[count] = now[i] - before[i];
      at[count] = i;
      count += now[i] != before[i];
    }
  }
};

// Adds the products with kVectors vectors of each row of h.
template <int kVectors>
void add_changed_rows(const Differences& changed, const float* h, int64_t h_stride, float* c) {
  Simd::Float sum[kVectors];
  for (int i = 0; i < kVectors; ++i) sum[i] = Simd::load(c + i * kWidth);
  for (int64_t k = 0; k < changed.count; ++k) {
    const float* row = h + changed.at[k] * h_stride;
    const Simd::Float by = Simd::broadcast(changed.by[k]);
    for (int i = 0; i < kVectors; ++i) sum[i] = Simd::multiply_add(by, Simd::load(row + i * kWidth), sum[i]);
  }
  for (int i = 0; i < kVectors; ++i) Simd::store(c + i * kWidth, sum[i]);
}

inline void add_changes_to_row(const Differences& changed, const float* h, int64_t h_stride, int64_t width, float* c) {
  int64_t col = 0;
  for (; col + 8 * kWidth <= width; col += 8 * kWidth) add_changed_rows<8>(changed, h + col, h_stride, c + col);
  for (; col + kWidth <= width; col += kWidth) add_changed_rows<1>(changed, h + col, h_stride, c + col);
  for (; col < width; ++col) {
    for (int64_t k = 0; k < changed.count; ++k) c[col] += changed.by[k] * h[changed.at[k] * h_stride + col];
  }
}

inline void add_changes(const Changes& s, int64_t begin, int64_t end) {
  const int64_t width = s.h.n_cols;
  for (int64_t first = 0; first < s.h.n_rows; first += kChunkRows) {
    const int64_t n = smaller<int64_t>(kChunkRows, s.h.n_rows - first);
    for (int64_t row = begin; row < end; ++row) {
      const float *now = s.now + row * s.h.n_rows + first, *before = s.before + row * s.h.n_rows + first;
      const Differences changed(now, before, n);
      if (changed.count > 0) {
        add_changes_to_row(changed, row_of<float>(s.h, first), s.h.stride, width, s.c + row * width);
      }
    }
  }
}

}  // namespace WANDA_ISA
