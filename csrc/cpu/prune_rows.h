// The num_pruned lowest of each row: bisection on integer keys over [min, max], exact, with an early exit.
// A row's keys stay in L1 or L2; a pass compares kWidth of them a cycle, and 10 to 20 passes beat any histogram.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

// Prune every key below `key`, and the first `ties` of those equal to it.
struct Threshold {
  int32_t key;
  int64_t ties;
};

inline Threshold find_threshold(const int32_t* keys, int64_t n_cols, int64_t padded, int64_t num_pruned) {
  if (num_pruned == 0) return {0, 0};
  if (num_pruned == n_cols) return {wanda::kPaddingKey, 0};
  const Range range = range_of(keys, n_cols);
  int32_t low = range.low, high = range.high + 1;  // count_below(low) <= num_pruned < count_below(high)
  int64_t below_low = 0;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t below = count_below(keys, padded, middle);
    if (below == num_pruned) return {middle, 0};
    if (below < num_pruned) {
      low = middle;
      below_low = below;
    } else {
      high = middle;
    }
  }
  return {low, num_pruned - below_low};
}

inline uint32_t lowest_bits(uint32_t bits, int64_t count) {
  uint32_t kept = bits;
  for (; count > 0; --count) kept &= kept - 1;
  return bits ^ kept;
}

inline void mark_below(const int32_t* keys, int64_t padded, Threshold threshold, uint8_t* pruned) {
  const Simd::Int bound = Simd::broadcast(threshold.key);
  int64_t ties = threshold.ties;
  for (int64_t col = 0; col < padded; col += kWidth) {
    const Simd::Int key = Simd::load(keys + col);
    uint32_t bits = Simd::to_bits(Simd::less(key, bound));
    if (ties > 0) {
      const uint32_t equal = Simd::to_bits(Simd::equal(key, bound));
      const int count = __builtin_popcount(equal);
      bits |= count <= ties ? equal : lowest_bits(equal, ties);
      ties -= smaller<int64_t>(count, ties);
    }
    store_bits(pruned, col, bits);
  }
}

inline void prune_rows(const Selection& s, int64_t num_pruned, int64_t begin, int64_t end, void* memory) {
  const int64_t n_cols = s.weight.n_cols, padded = round_up(n_cols, kWidth);
  const Scratch scratch(memory, n_cols);
  for (int64_t row = begin; row < end; ++row) {
    row_keys(s, row, padded, scratch.keys);
    const Threshold threshold = find_threshold(scratch.keys, n_cols, padded, num_pruned);
    mark_below(scratch.keys, padded, threshold, scratch.pruned);
    apply_row(s, row, scratch.pruned);
  }
}

}  // namespace WANDA_ISA
