// The thresholds of Wanda's variant for one alpha, without a sort. A key is pruned if the mass of all lower keys plus
// its own is at most alpha * the row's mass. That sum grows with the key, so bisection finds the largest such key.
// Masses are the reference's fixed-point integers, whose sums are exact in any order.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

// The mass of a score that overflowed is that of the largest finite score.
constexpr int32_t kLargestFinite = 0x7f7fffff;

inline int fraction_bits(int64_t n_cols) {
  int length = 1;  // bits of n_cols - 1
  while ((n_cols - 1) >> length) ++length;
  return smaller(36, 53 - length);
}

// mass = floor(score * 2^(bits - E)), where 2^(E-1) <= the row's largest score < 2^E and E >= -125.
struct FixedPoint {
  double power_of_two;

  FixedPoint(int32_t highest_key, int64_t n_cols) {
    const int exponent = larger((smaller(highest_key, kLargestFinite) >> 23) - 126, -125);
    const uint64_t bits = static_cast<uint64_t>(fraction_bits(n_cols) - exponent + 1023) << 52;
    memcpy(&power_of_two, &bits, sizeof bits);
  }
  int64_t mass(int32_t key) const {
    return static_cast<int64_t>(static_cast<double>(float_of(smaller(key, kLargestFinite))) * power_of_two);
  }
};

inline int64_t mass_below(const int32_t* keys, const int64_t* masses, int64_t n_cols, int32_t pivot) {
  int64_t sum = 0;
  for (int64_t col = 0; col < n_cols; ++col) sum += masses[col] & -int64_t{keys[col] < pivot};
  return sum;
}

inline int32_t find_key(const int32_t* keys, Range range, int64_t* masses, int64_t n_cols, double alpha,
                        wanda::cpu::Bracket bracket) {
  const FixedPoint fixed_point(range.high, n_cols);
  int64_t total = 0;
  for (int64_t col = 0; col < n_cols; ++col) total += masses[col] = fixed_point.mass(keys[col]);
  const int64_t limit = static_cast<int64_t>(static_cast<double>(total) * alpha);
  int32_t low = larger(bracket.low, range.low - 1), high = smaller(bracket.high, range.high + 1);
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (mass_below(keys, masses, n_cols, middle) + fixed_point.mass(middle) <= limit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

inline int64_t find_variant(const Selection& s, double alpha, const wanda::cpu::Bracket* brackets,
                            int32_t* thresholds, int64_t begin, int64_t end, void* memory) {
  const int64_t n_cols = s.weight.n_cols, padded = round_up(n_cols, kWidth);
  const Scratch scratch(memory, n_cols);
  int64_t n_pruned = 0;
  for (int64_t row = begin; row < end; ++row) {
    const Range range = row_keys(s, row, padded, scratch.keys);
    thresholds[row] = find_key(scratch.keys, range, scratch.masses, n_cols, alpha, brackets[row]);
    n_pruned += count_below(scratch.keys, padded, thresholds[row] + 1);
  }
  return n_pruned;
}

}  // namespace WANDA_ISA
