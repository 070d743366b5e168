// The passes over rows that prune_matrix.cpp and prune_variant.cpp are made of: a histogram of keys, and pruning or
// marking every key up to a threshold.
#pragma once

#include "prune_rows.h"

namespace WANDA_ISA {

inline void count_keys(const Selection& s, int32_t high, uint32_t* bins, int64_t begin, int64_t end, void* memory) {
  const Scratch scratch(memory, s.weight.n_cols);
  for (int64_t row = begin; row < end; ++row) {
    row_keys(s, row, s.weight.n_cols, scratch.keys);
    for (int64_t col = 0; col < s.weight.n_cols; ++col) {
      const int32_t key = scratch.keys[col];
      if (high < 0) {
        ++bins[key >> wanda::cpu::kLowBits];
      } else if (key >> wanda::cpu::kLowBits == high) {
        ++bins[key & ((1 << wanda::cpu::kLowBits) - 1)];
      }
    }
  }
}

inline void prune_at_most(const Selection& s, const int32_t* thresholds, int64_t threshold_step, int64_t begin,
                          int64_t end, void* memory) {
  const int64_t n_cols = s.weight.n_cols, padded = round_up(n_cols, kWidth);
  const Scratch scratch(memory, n_cols);
  for (int64_t row = begin; row < end; ++row) {
    const int32_t bound = thresholds[row * threshold_step] + 1;
    row_keys(s, row, padded, scratch.keys);
    prune_below(s, row, scratch.keys, {bound, 0}, scratch.pruned);
  }
}

inline void mark_at_most(const Selection& s, int32_t threshold, uint8_t* pruned, int64_t stride, int64_t begin,
                         int64_t end, void* memory) {
  const Scratch scratch(memory, s.weight.n_cols);
  for (int64_t row = begin; row < end; ++row) {
    row_keys(s, row, s.weight.n_cols, scratch.keys);
    for (int64_t col = 0; col < s.weight.n_cols; ++col) pruned[row * stride + col] = scratch.keys[col] <= threshold;
  }
}

}  // namespace WANDA_ISA
