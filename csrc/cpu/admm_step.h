// A step of ADMM behind its product: u = primal + dual is projected to the pattern, and primal and dual are updated.
//
// A row is read and written once. Between its two passes it stays in L1 or L2, with u in place of primal. Groups of 2, 4,
// 8 or 16 that fit a vector need one pass.
#pragma once

#include "column_tile.h"
#include "prune_nm.h"
#include "prune_rows.h"

namespace WANDA_ISA {

using wanda::AdmmStep;

struct AdmmRow {
  float *primal, *dual;
  const float* dense;
  uint8_t* pruned;
  int64_t n_cols;

  AdmmRow(const AdmmStep& s, int64_t row)
      : primal(s.primal + row * s.n_cols),
        dual(s.dual + row * s.n_cols),
        dense(s.dense + row * s.n_cols),
        pruned(s.pruned + row * s.n_cols),
        n_cols(s.n_cols) {}

  // u of kWidth columns, 0 past the row.
  Simd::Float sum(int64_t col) const {
    return Simd::add(load_part(primal + col, n_cols - col), load_part(dual + col, n_cols - col));
  }

  // Writes kWidth columns. Returns how many elements of `pruned` changed.
  int update(int64_t col, Simd::Float u, Simd::Mask gone, Simd::Float ratio) const {
    const int64_t left = n_cols - col;
    const Simd::Int was = Simd::bits(load_part(pruned + col, left)), zero = Simd::broadcast(0);
    const Simd::Float y = Simd::zero_unless(gone, Simd::multiply(u, ratio));
    const Simd::Float distance = Simd::subtract(load_part(dense + col, left), Simd::zero_if(gone, u));
    store_part(primal + col, Simd::add(distance, y), left);
    store_part(dual + col, y, left);
    store_part(pruned + col, Simd::as_float(Simd::increment_where(gone, zero)), left);
    const uint32_t changed = Simd::to_bits(gone) ^ Simd::to_bits(Simd::less(zero, was));
    return __builtin_popcount(left < kWidth ? changed & ((1u << left) - 1) : changed);
  }
};

template <int M>
int64_t admm_step_in_vectors(const AdmmStep& s, int64_t begin, int64_t end) {
  const LowestOfGroup<M> lowest(s.n);
  const Simd::Float ratio = Simd::broadcast(s.ratio);
  int64_t changed = 0;
  for (int64_t i = begin; i < end; ++i) {
    const AdmmRow row(s, i);
    for (int64_t col = 0; col < s.n_cols; col += kWidth) {
      const Simd::Float u = row.sum(col);
      changed += row.update(col, u, lowest(key_of(u)), ratio);
    }
  }
  return changed;
}

// Replaces primal by u, and writes its keys as row_keys does.
inline Range admm_keys(const AdmmRow& row, int64_t padded, int32_t* keys) {
  Simd::Int low = Simd::broadcast(wanda::kPaddingKey), high = Simd::broadcast(0);
  for (int64_t col = 0; col < row.n_cols; col += kWidth) {
    const Simd::Float u = row.sum(col);
    const Simd::Int key = key_of(u);
    store_part(row.primal + col, u, row.n_cols - col);
    Simd::store(keys + col, key);
    low = Simd::min(low, key);
    high = Simd::max(high, key);
  }
  for (int64_t col = row.n_cols; col < padded; ++col) keys[col] = wanda::kPaddingKey;
  return {Simd::lowest(low), Simd::highest(high)};
}

inline int64_t admm_step_by_rows(const AdmmStep& s, int64_t begin, int64_t end, const Scratch& scratch) {
  const int64_t padded = round_up(s.n_cols, kWidth);
  const Simd::Float ratio = Simd::broadcast(s.ratio);
  Guess guess;
  int64_t changed = 0;
  for (int64_t i = begin; i < end; ++i) {
    const AdmmRow row(s, i);
    const Range range = admm_keys(row, padded, scratch.keys);
    Threshold threshold = find_threshold(scratch.keys, s.n_cols, padded, s.num_pruned, range, guess);
    const Simd::Int bound = Simd::broadcast(threshold.key);
    for (int64_t col = 0; col < s.n_cols; col += kWidth) {
      const Simd::Mask gone = Simd::lanes(lowest_lanes(Simd::load(scratch.keys + col), bound, threshold.ties));
      changed += row.update(col, load_part(row.primal + col, s.n_cols - col), gone, ratio);
    }
  }
  return changed;
}

inline int64_t admm_step_by_network(const AdmmStep& s, int64_t begin, int64_t end, const Scratch& scratch) {
  const Network network(s.m, s.m - s.n - 1);
  const Simd::Float ratio = Simd::broadcast(s.ratio);
  int64_t changed = 0;
  for (int64_t i = begin; i < end; ++i) {
    const AdmmRow row(s, i);
    admm_keys(row, round_up(s.n_cols, kWidth * s.m), scratch.keys);
    mark_by_network(scratch.keys, s.n_cols / s.m, s.n, s.m, network, scratch.pruned);
    for (int64_t col = 0; col < s.n_cols; col += kWidth) {
      const Simd::Mask gone = Simd::lanes(load_bits(scratch.pruned, col));
      changed += row.update(col, load_part(row.primal + col, s.n_cols - col), gone, ratio);
    }
  }
  return changed;
}

inline int64_t admm_step(const AdmmStep& s, int64_t begin, int64_t end, void* memory) {
  const Scratch scratch(memory, s.n_cols);
  if (s.m == 0) return admm_step_by_rows(s, begin, end, scratch);
  if (s.m == 2) return admm_step_in_vectors<2>(s, begin, end);
  if (s.m == 4) return admm_step_in_vectors<4>(s, begin, end);
  if (s.m == 8) return admm_step_in_vectors<8>(s, begin, end);
  if constexpr (kWidth == 16) {
    if (s.m == 16) return admm_step_in_vectors<16>(s, begin, end);
  }
  return admm_step_by_network(s, begin, end, scratch);
}

}  // namespace WANDA_ISA
