// Mask descent in groups of m columns: of all masks that keep n, each group takes the one of the lowest error.
//
// Rows are independent, so each lane of a vector holds one row: kWidth rows are transposed into columns of vectors, which
// stay in L1. Products and sums have the reference's order and are rounded one by one. A sum that begins with the same
// columns as the one before it is continued, not repeated.
#pragma once

#include "column_tile.h"

namespace WANDA_ISA {

using wanda::MaskBlock;
using wanda::cpu::Candidates;
using wanda::cpu::kMaxGroup;

// kWidth rows, transposed.
struct DescentTile {
  alignas(64) float w[kTileColumns * kWidth];
  alignas(64) float c[kTileColumns * kWidth];
  alignas(64) int32_t pruned[kTileColumns * kWidth];  // 0 or 1

  Simd::Mask is_pruned(int64_t col) const {
    return Simd::less(Simd::broadcast(0), Simd::load(pruned + col * kWidth));
  }
};

inline Simd::Int bit(int i) { return Simd::broadcast(static_cast<int32_t>(1u << i)); }

// The terms of a group's errors. kM: the columns, 0 if they are known only at run time.
template <int kM>
struct GroupTerms {
  static constexpr int kColumns = kM == 0 ? kMaxGroup : kM;
  Simd::Float w[kColumns], removed[kColumns], alone[kColumns];
  Simd::Float pair[kColumns][kColumns];  // [j][i], j < i
  Simd::Float error;                     // of the present mask
  Simd::Int mask;                        // of the present mask: bit i is set if column i is pruned

  GroupTerms(const MaskBlock& block, int64_t first, int m, const DescentTile& tile) {
    const float* h = block.h + first * (block.h_stride + 1);
    Simd::Mask pruned[kColumns];
    mask = Simd::broadcast(0);
    for (int i = 0; i < m; ++i) {
      w[i] = Simd::load(tile.w + (first + i) * kWidth);
      pruned[i] = tile.is_pruned(first + i);
      removed[i] = Simd::zero_unless(pruned[i], w[i]);
      mask = Simd::add_where(pruned[i], mask, bit(i));
    }
    error = Simd::broadcast(0.0f);
    for (int i = 0; i < m; ++i) {
      Simd::Float others = Simd::load(tile.c + (first + i) * kWidth);
      for (int j = 0; j < m; ++j) {
        others = Simd::subtract(others, Simd::multiply(removed[j], Simd::broadcast(h[j * block.h_stride + i])));
      }
      const Simd::Float twice = Simd::add(w[i], w[i]), square = Simd::multiply(w[i], w[i]);
      alone[i] = Simd::add(Simd::multiply(twice, others),
                           Simd::multiply(square, Simd::broadcast(h[i * block.h_stride + i])));
      error = Simd::add(error, Simd::zero_unless(pruned[i], alone[i]));
      for (int j = 0; j < i; ++j) {
        const Simd::Float product = Simd::multiply(Simd::add(w[j], w[j]), w[i]);
        pair[j][i] = Simd::multiply(product, Simd::broadcast(h[j * block.h_stride + i]));
        error = Simd::add(error, Simd::zero_unless(Simd::both(pruned[i], pruned[j]), pair[j][i]));
      }
    }
  }
};

struct Best {
  Simd::Float error;
  Simd::Int mask;

  void offer(Simd::Float other, Simd::Int other_mask) {
    const Simd::Mask better = Simd::less(other, error);
    error = Simd::select(better, other, error);
    mask = Simd::select(better, other_mask, mask);
  }
};

// The best mask of each lane. A mask must be strictly better than those before it, of which the present is the first.
inline Simd::Int best_mask(const GroupTerms<0>& terms, const Candidates& candidates) {
  Best best = {terms.error, terms.mask};
  Simd::Float error[kMaxGroup + 1];  // of the first columns of the candidate
  error[0] = Simd::broadcast(0.0f);
  for (int k = 0; k < candidates.count; ++k) {
    const uint8_t* columns = candidates.columns[k];
    for (int d = candidates.shared[k]; d < candidates.n_pruned; ++d) {
      Simd::Float sum = Simd::add(error[d], terms.alone[columns[d]]);
      for (int e = 0; e < d; ++e) sum = Simd::add(sum, terms.pair[columns[e]][columns[d]]);
      error[d + 1] = sum;
    }
    best.offer(error[candidates.n_pruned], Simd::broadcast(static_cast<int32_t>(candidates.masks[k])));
  }
  return best.mask;
}

// The same for two pruned columns of a known number: the terms stay in registers.
template <int kM>
Simd::Int best_mask(const GroupTerms<kM>& terms, const Candidates&) {
  Best best = {terms.error, terms.mask};
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) {
#pragma GCC unroll 8
    for (int i = j + 1; i < kM; ++i) {
      const Simd::Float sum = Simd::add(Simd::add(terms.alone[j], terms.alone[i]), terms.pair[j][i]);
      best.offer(sum, Simd::broadcast(1 << j | 1 << i));
    }
  }
  return best.mask;
}

// c[:, col] += added[k] * h[rows[k], col], for k = 0 to kRows - 1 in this order and col in [begin, end).
template <int kRows>
void add_products(const Simd::Float* added, const float* const* h, int64_t begin, int64_t end, float* c) {
  for (int64_t col = begin; col < end; ++col) {
    Simd::Float sum = Simd::load(c + col * kWidth);
    for (int k = 0; k < kRows; ++k) sum = Simd::add(sum, Simd::multiply(added[k], Simd::broadcast(h[k][col])));
    Simd::store(c + col * kWidth, sum);
  }
}

// Writes the new mask, and adds its change to c in the columns to the right. Products with 0 are left out: they could
// only change the sign of a zero.
template <int kM>
void replace_mask(const MaskBlock& block, const GroupTerms<kM>& terms, Simd::Int mask, int64_t first, int m,
                  DescentTile& tile) {
  const Simd::Int zero = Simd::broadcast(0);
  Simd::Float added[kMaxGroup];
  const float* h[kMaxGroup];
  int n_changed = 0;
  for (int i = 0; i < m; ++i) {
    const Simd::Mask pruned = Simd::equal(Simd::bit_and(mask, bit(i)), bit(i));
    const Simd::Mask kept_before = Simd::equal(Simd::bit_and(terms.mask, bit(i)), zero);
    if (Simd::to_bits(pruned) != (Simd::to_bits(kept_before) ^ ((1u << kWidth) - 1))) {
      h[n_changed] = block.h + (first + i) * block.h_stride;
      added[n_changed++] = Simd::subtract(Simd::zero_unless(pruned, terms.w[i]), terms.removed[i]);
      Simd::store(tile.pruned + (first + i) * kWidth, Simd::increment_where(pruned, zero));
    }
  }
  const int64_t begin = first + m, end = block.w.n_cols;
  int k = 0;
  for (; k + 4 <= n_changed; k += 4) add_products<4>(added + k, h + k, begin, end, tile.c);
  for (; k + 2 <= n_changed; k += 2) add_products<2>(added + k, h + k, begin, end, tile.c);
  for (; k < n_changed; ++k) add_products<1>(added + k, h + k, begin, end, tile.c);
}

template <int kM>
void refine_tile(const MaskBlock& block, const Candidates& candidates, DescentTile& tile) {
  const int m = kM == 0 ? block.m : kM;
  for (int64_t first = 0; first < block.w.n_cols; first += m) {
    const GroupTerms<kM> terms(block, first, m, tile);
    const Simd::Int mask = best_mask(terms, candidates);
    if (Simd::to_bits(Simd::equal(mask, terms.mask)) == (1u << kWidth) - 1) continue;
    replace_mask(block, terms, mask, first, m, tile);
  }
}

inline void refine_groups(const MaskBlock& block, const Candidates& candidates, int64_t begin, int64_t end) {
  const int64_t width = block.w.n_cols;
  DescentTile tile;
  for (int64_t row = begin; row < end; row += kWidth) {
    const int64_t n_rows = smaller<int64_t>(kWidth, end - row);
    uint8_t* pruned = block.pruned + row * block.pruned_stride;
    rows_to_columns(row_of<float>(block.w, row), block.w.stride, n_rows, width, tile.w);
    rows_to_columns(block.c + row * width, width, n_rows, width, tile.c);
    rows_to_columns(pruned, block.pruned_stride, n_rows, width, reinterpret_cast<float*>(tile.pruned));
    block.n == 2 && block.m == 4 ? refine_tile<4>(block, candidates, tile) : refine_tile<0>(block, candidates, tile);
    columns_to_rows(reinterpret_cast<const float*>(tile.pruned), n_rows, width, pruned, block.pruned_stride);
  }
}

}  // namespace WANDA_ISA
