// Zero the num_pruned smallest scores of each row; ties prune the lower column first. The threshold is exact: a pivot
// is moved until exactly num_pruned keys are below it.
//
// A row's keys stay in L1 or L2, and a pass compares kWidth of them per cycle. The first pivot is the last row's
// threshold. The next ones are extrapolated from the density of keys around it: 7 to 11 passes, where bisection takes
// 11 to 14.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

// Every key below `key` is pruned, and the first `ties` of those equal to it.
struct Threshold {
  int32_t key;
  int64_t ties;
};

// The end of the last row's search. Rows resemble each other, and a wrong guess only costs passes.
struct Guess {
  float score = 0;
  float keys_per_score = 0;  // density of keys around `score`
};

// The smallest and the largest of the keys in [low, high). There must be at least one.
inline Range keys_between(const int32_t* keys, int64_t padded, int32_t low, int32_t high) {
  const Simd::Int first = Simd::broadcast(low), last = Simd::broadcast(high - 1);
  // Without its sign bit, the distance of a key outside is larger than all distances inside.
  const Simd::Int unsign = Simd::broadcast(0x7fffffff);
  Simd::Int above = unsign, below = unsign;
  for (int64_t col = 0; col < padded; col += kWidth) {
    const Simd::Int key = Simd::load(keys + col);
    above = Simd::min(above, Simd::bit_and(Simd::subtract(key, first), unsign));
    below = Simd::min(below, Simd::bit_and(Simd::subtract(last, key), unsign));
  }
  return {low + Simd::lowest(above), high - 1 - Simd::lowest(below)};
}

// The pivot that has `missing` more keys below it than `score` if their density is keys_per_score.
inline int32_t next_pivot(float score, float keys_per_score, int64_t missing) {
  const float distance = static_cast<float>(missing) + (missing < 0 ? -0.5f : 0.5f);
  return bits_of(score + distance / keys_per_score);
}

inline Threshold find_threshold(const int32_t* keys, int64_t n_cols, int64_t padded, int64_t num_pruned, Range range,
                                Guess& guess) {
  if (num_pruned == 0) return {0, 0};
  if (num_pruned == n_cols) return {wanda::kPaddingKey, 0};
  constexpr int64_t kFarApart = 32;  // fewer keys between two pivots say little about the density
  int32_t low = range.low, high = range.high + 1;
  int64_t below_low = 0, below_high = n_cols;  // below_low <= num_pruned < below_high
  int64_t last_below = num_pruned;
  int32_t pivot = bits_of(guess.score);
  for (int pass = 1; high - low > 1; ++pass) {
    if (pivot <= low || pivot >= high || pass % 8 == 0) pivot = low + (high - low) / 2;
    const int64_t below = count_below(keys, padded, pivot);
    if (below == num_pruned) {
      guess.score = float_of(pivot);
      return {pivot, 0};
    }
    const float score = float_of(pivot);
    const int64_t apart = below - last_below;
    if (pass > 1 && (apart >= kFarApart || apart <= -kFarApart)) {
      guess.keys_per_score = static_cast<float>(apart) / (score - guess.score);
    }
    guess.score = score;
    last_below = below;
    const bool none_between = below == below_low || below == below_high;
    if (below < num_pruned) {
      low = pivot;
      below_low = below;
    } else {
      high = pivot;
      below_high = below;
    }
    // The pivot hit a gap, or only ties are left. Shrink the bounds to the keys between them.
    if (none_between) {
      const Range left = keys_between(keys, padded, low, high);
      low = left.low;
      high = left.high + 1;
    }
    pivot = next_pivot(score, guess.keys_per_score, num_pruned - below);
  }
  return {low, num_pruned - below_low};
}

inline uint32_t lowest_bits(uint32_t bits, int64_t count) {
  uint32_t kept = bits;
  for (; count > 0; --count) kept &= kept - 1;
  return bits ^ kept;
}

// Bits of the lanes whose keys are below the bound, and of the first `ties` equal to it, which are subtracted from `ties`.
inline uint32_t lowest_lanes(Simd::Int key, Simd::Int bound, int64_t& ties) {
  const uint32_t below = Simd::to_bits(Simd::less(key, bound));
  if (ties == 0) return below;
  const uint32_t equal = Simd::to_bits(Simd::equal(key, bound));
  const int count = __builtin_popcount(equal);
  const uint32_t taken = count <= ties ? equal : lowest_bits(equal, ties);
  ties -= smaller<int64_t>(count, ties);
  return below | taken;
}

// Zeroes the row's weights whose keys are below the threshold, and the first `ties` equal to it.
inline void prune_below(const Selection& s, int64_t row, const int32_t* keys, Threshold threshold, uint8_t* pruned) {
  const Simd::Int bound = Simd::broadcast(threshold.key);
  const bool wants_mask = s.mask != nullptr;
  int64_t ties = threshold.ties;
  with_row(s.weight, row, [&](auto* w) {
    each_vector(w, s.weight.n_cols, [&](auto* w, int64_t col) {
      const Simd::Int key = Simd::load(keys + col);
      if (ties == 0 && !wants_mask) return Simd::zero_where(Simd::less(key, bound), w);
      const uint32_t bits = lowest_lanes(key, bound, ties);
      store_bits(pruned, col, bits);
      Simd::zero_where(bits, w);
    });
  });
  emit_mask(s, row, pruned);
}

inline void prune_rows(const Selection& s, int64_t num_pruned, int64_t begin, int64_t end, void* memory) {
  const int64_t n_cols = s.weight.n_cols, padded = round_up(n_cols, kWidth);
  const Scratch scratch(memory, n_cols);
  Guess guess;
  for (int64_t row = begin; row < end; ++row) {
    const Range range = row_keys(s, row, padded, scratch.keys);
    const Threshold threshold = find_threshold(scratch.keys, n_cols, padded, num_pruned, range, guess);
    prune_below(s, row, scratch.keys, threshold, scratch.pruned);
  }
}

}  // namespace WANDA_ISA
