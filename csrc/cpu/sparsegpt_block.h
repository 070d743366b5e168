// One block of SparseGPT: prune its columns from left to right, and subtract each error from the columns to its right.
//
// Rows are independent, so each lane of a vector holds one row: kWidth rows are transposed into columns of vectors,
// which stay in L1. Columns are processed in chunks of about 8, whole groups of n:m each. A chunk's errors stay in
// registers while every column to its right is read and written once. Subtractions have the reference's order.
#pragma once

#include "column_tile.h"

namespace WANDA_ISA {

using wanda::SparseGptBlock;

// Errors held at once. With a column and its products they fill 16 registers.
constexpr int64_t kChunkColumns = 8;

// kWidth rows, transposed.
struct Tile {
  alignas(64) float w[kTileColumns * kWidth];
  alignas(64) float errors[kTileColumns * kWidth];
  alignas(64) int32_t pruned[kTileColumns * kWidth];  // 0 or 1
};

inline Simd::Int column_key(const Selection& s, Simd::Float w, int64_t col) {
  if (s.divisor != nullptr) return key_of(Simd::divide(Simd::multiply(w, w), Simd::broadcast(s.divisor[col])));
  if (s.root != nullptr) return key_of(Simd::multiply(w, Simd::broadcast(s.root[col])));
  return key_of(w);
}

// Marks the m - n smallest keys of columns [first, first + m); ties prune the lower column first.
inline void choose_group(const SparseGptBlock& block, int64_t first, Tile& tile) {
  const int n = block.n, m = block.m;
  Simd::Int key[wanda::cpu::kMaxGroup], rank[wanda::cpu::kMaxGroup];
  for (int i = 0; i < m; ++i) {
    key[i] = column_key(block.columns, Simd::load(tile.w + (first + i) * kWidth), first + i);
    // Assumes that all earlier keys are at most this one; the comparisons below correct that.
    rank[i] = Simd::broadcast(i);
  }
  const Simd::Int minus_one = Simd::broadcast(-1);
  for (int i = 0; i < m; ++i) {
    for (int j = i + 1; j < m; ++j) {
      const auto later_is_less = Simd::less(key[j], key[i]);
      rank[i] = Simd::increment_where(later_is_less, rank[i]);
      rank[j] = Simd::add_where(later_is_less, rank[j], minus_one);
    }
  }
  const Simd::Int num_pruned = Simd::broadcast(m - n), zero = Simd::broadcast(0);
  for (int i = 0; i < m; ++i) {
    Simd::store(tile.pruned + (first + i) * kWidth, Simd::increment_where(Simd::less(rank[i], num_pruned), zero));
  }
}

// w[:, j] -= errors[:, i + k] * u[i + k, j], for k = 0 to kErrors - 1 in this order and j in [begin, end).
template <int kErrors>
void subtract_errors(const SparseGptBlock& block, int64_t i, int64_t begin, int64_t end, Tile& tile) {
  const float* u = block.u + i * block.u_stride;
  Simd::Float error[kErrors];
  for (int k = 0; k < kErrors; ++k) error[k] = Simd::load(tile.errors + (i + k) * kWidth);
  for (int64_t j = begin; j < end; ++j) {
    Simd::Float w = Simd::load(tile.w + j * kWidth);
    for (int k = 0; k < kErrors; ++k) {
      w = Simd::subtract(w, Simd::multiply(error[k], Simd::broadcast(u[k * block.u_stride + j])));
    }
    Simd::store(tile.w + j * kWidth, w);
  }
}

inline void prune_column(const SparseGptBlock& block, int64_t i, Tile& tile) {
  const Simd::Float w = Simd::load(tile.w + i * kWidth);
  const auto pruned = Simd::less(Simd::broadcast(0), Simd::load(tile.pruned + i * kWidth));
  const Simd::Float quotient = Simd::divide(w, Simd::broadcast(block.u[i * block.u_stride + i]));
  Simd::store(tile.errors + i * kWidth, Simd::zero_unless(pruned, quotient));
  Simd::store(tile.w + i * kWidth, Simd::zero_if(pruned, w));
}

inline void update_tile(const SparseGptBlock& block, Tile& tile) {
  const int64_t width = block.columns.weight.n_cols;
  const int64_t chunk = block.m == 0 ? kChunkColumns : round_up(kChunkColumns, block.m);
  for (int64_t first = 0; first < width; first += chunk) {
    const int64_t end = smaller(width, first + chunk);
    for (int64_t i = first; i < end; ++i) {
      if (block.m != 0 && i % block.m == 0) choose_group(block, i, tile);
      prune_column(block, i, tile);
      subtract_errors<1>(block, i, i + 1, end, tile);
    }
    int64_t i = first;
    for (; i + 8 <= end; i += 8) subtract_errors<8>(block, i, end, width, tile);
    for (; i + 4 <= end; i += 4) subtract_errors<4>(block, i, end, width, tile);
    for (; i < end; ++i) subtract_errors<1>(block, i, end, width, tile);
  }
}

inline void sparsegpt_block(const SparseGptBlock& block, int64_t begin, int64_t end) {
  const Matrix& weight = block.columns.weight;
  const int64_t width = weight.n_cols;
  Tile tile;
  for (int64_t row = begin; row < end; row += kWidth) {
    const int64_t n_rows = smaller<int64_t>(kWidth, end - row);
    uint8_t* pruned = block.pruned + row * block.pruned_stride;
    rows_to_columns(row_of<float>(weight, row), weight.stride, n_rows, width, tile.w);
    if (block.m == 0) {
      rows_to_columns(pruned, block.pruned_stride, n_rows, width, reinterpret_cast<float*>(tile.pruned));
    }
    update_tile(block, tile);
    columns_to_rows(tile.w, n_rows, width, row_of<float>(weight, row), weight.stride);
    columns_to_rows(tile.errors, n_rows, width, block.errors + row * width, width);
    if (block.m != 0) {
      columns_to_rows(reinterpret_cast<const float*>(tile.pruned), n_rows, width, pruned, block.pruned_stride);
    }
  }
}

}  // namespace WANDA_ISA
