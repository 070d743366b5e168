// Mask descent by swaps of a kept column u and a pruned column p, the best one first, a row at a time.
//
// A swap's change is (prune_u + keep_p) - (2 w_u w_p) h_up. For each u, `bound` is at most the change with any p: the
// lowest keep_p is known, and abs(h_up) <= reach[u] * scale[p]. Rounding is monotonic, so the bound holds for rounded
// changes too. Only the u whose bounds are below the best change found so far are tried with all p.
#pragma once

#include <cfloat>
#include <cmath>

#include "column_tile.h"

namespace WANDA_ISA {

using wanda::MaskBlock;
using wanda::cpu::SwapBounds;

// A group can begin at any column, and its vectors reach past its end.
constexpr int64_t kRowRoom = wanda::cpu::kMaxBlock + wanda::cpu::kMaxWidth;

struct SwapRow {
  float w[kRowRoom] = {}, twice[kRowRoom] = {}, square[kRowRoom] = {}, c[kRowRoom] = {};
  float size[kRowRoom] = {};   // abs(w) * scale
  float reach[kRowRoom] = {};  // abs(2 w) * reach, rounded up
  float prune[kRowRoom], keep[kRowRoom], bound[kRowRoom];
  int32_t pruned[kRowRoom] = {};  // 0 or -1
};

// The columns [first, end) of a group. Vectors cover [first, padded_end).
struct Group {
  int64_t first, end, padded_end;
};

struct Swap {
  float change = 0;  // a swap must lower the error
  int64_t u = -1, p = -1;
};

inline Simd::Float absolute(Simd::Float x) {
  return Simd::as_float(Simd::bit_and(Simd::bits(x), Simd::broadcast(0x7fffffff)));
}

inline void load_row(const MaskBlock& block, const SwapBounds& bounds, int64_t row, SwapRow& r) {
  // A product of few factors is rounded by less than this. The subnormal part is in `bound`.
  constexpr float kRoundedUp = 1.0001f;
  const int64_t width = block.w.n_cols;
  memcpy(r.w, row_of<float>(block.w, row), width * sizeof(float));
  memcpy(r.c, block.c + row * width, width * sizeof(float));
  for (int64_t col = 0; col < width; ++col) {
    r.twice[col] = 2 * r.w[col];
    r.square[col] = (r.w[col] * r.w[col]) * block.h[col * (block.h_stride + 1)];
    r.size[col] = std::fabs(r.w[col]) * bounds.scale[col];
    r.reach[col] = std::fabs(r.twice[col]) * bounds.reach[col] * kRoundedUp;
    r.pruned[col] = -static_cast<int32_t>(block.pruned[row * block.pruned_stride + col]);
  }
}

// What the search for the best swap begins with.
struct Lowest {
  float keep, bound, c;  // c: the largest abs(c)
};

// Writes prune, keep and bound of a group; infinity for columns that cannot be pruned or kept.
inline Lowest weigh(const Group& group, SwapRow& r) {
  const Simd::Float infinity = Simd::broadcast(INFINITY), zero = Simd::broadcast(0.0f);
  Simd::Float lowest_keep = infinity, largest_size = zero, lowest_bound = infinity;
  Simd::Int largest_c = Simd::broadcast(0);
  for (int64_t col = group.first; col < group.end; col += kWidth) {
    const Simd::Mask pruned = Simd::less(Simd::load(r.pruned + col), Simd::broadcast(0));
    const Simd::Float c = Simd::load(r.c + col), square = Simd::load(r.square + col);
    const Simd::Float linear = Simd::multiply(Simd::load(r.twice + col), c);
    Simd::store(r.prune + col, Simd::select(pruned, infinity, Simd::add(linear, square)));
    Simd::store(r.keep + col, Simd::select(pruned, Simd::subtract(square, linear), infinity));
    largest_c = Simd::max(largest_c, Simd::bits(absolute(c)));
  }
  for (int64_t col = group.end; col < group.padded_end; ++col) r.prune[col] = r.keep[col] = INFINITY;
  for (int64_t col = group.first; col < group.end; col += kWidth) {
    const Simd::Float keep = Simd::load(r.keep + col);
    lowest_keep = Simd::min(lowest_keep, keep);
    largest_size = Simd::max(largest_size, Simd::zero_unless(Simd::less(keep, infinity), Simd::load(r.size + col)));
  }
  const float keep = Simd::lowest(lowest_keep);
  const Simd::Float best_keep = Simd::broadcast(keep), size = Simd::broadcast(Simd::highest(largest_size));
  for (int64_t col = group.first; col < group.end; col += kWidth) {
    const Simd::Float pairs = Simd::add(Simd::multiply(Simd::load(r.reach + col), size), Simd::broadcast(1e-30f));
    const Simd::Float bound = Simd::subtract(Simd::add(Simd::load(r.prune + col), best_keep), pairs);
    Simd::store(r.bound + col, bound);
    lowest_bound = Simd::min(lowest_bound, bound);
  }
  return {keep, Simd::lowest(lowest_bound), float_of(Simd::highest(largest_c))};
}

// The changes of u with kWidth p.
inline Simd::Float changes(const MaskBlock& block, const SwapRow& r, int64_t u, int64_t p) {
  const Simd::Float product = Simd::multiply(Simd::broadcast(r.twice[u]), Simd::load(r.w + p));
  const Simd::Float sum = Simd::add(Simd::broadcast(r.prune[u]), Simd::load(r.keep + p));
  return Simd::subtract(sum, Simd::multiply(product, Simd::load(block.h + u * block.h_stride + p)));
}

// Tries u with all p. Of equal changes the lowest u remains.
inline void try_column(const MaskBlock& block, const SwapRow& r, const Group& group, int64_t u, Swap& best) {
  Simd::Float lowest = Simd::broadcast(INFINITY);
  for (int64_t p = group.first; p < group.end; p += kWidth) lowest = Simd::min(lowest, changes(block, r, u, p));
  const float change = Simd::lowest(lowest);
  if (change < best.change || (change == best.change && u < best.u)) {
    best.change = change;
    best.u = u;
  }
}

// The first column of the group for which `is_so` has a bit.
template <typename IsSo>
int64_t first_column(const Group& group, const IsSo& is_so) {
  for (int64_t col = group.first; col < group.end; col += kWidth) {
    const uint32_t bits = Simd::to_bits(is_so(col));
    if (bits != 0) return col + __builtin_ctz(bits);
  }
  return -1;
}

inline Swap best_swap(const MaskBlock& block, const SwapRow& r, const Group& group, float lowest_bound) {
  Swap best;
  if (!(lowest_bound < 0)) return best;
  const Simd::Int lowest = Simd::broadcast(bits_of(lowest_bound));
  const int64_t promising = first_column(
      group, [&](int64_t col) { return Simd::equal(Simd::bits(Simd::load(r.bound + col)), lowest); });
  try_column(block, r, group, promising, best);
  for (int64_t col = group.first; col < group.end; col += kWidth) {
    const Simd::Mask hopeless = Simd::less(Simd::broadcast(best.change), Simd::load(r.bound + col));
    uint32_t bits = Simd::to_bits(hopeless) ^ ((1u << kWidth) - 1);
    for (; bits != 0; bits &= bits - 1) {
      const int64_t u = col + __builtin_ctz(bits);
      if (u != promising && r.bound[u] <= best.change) try_column(block, r, group, u, best);
    }
  }
  if (best.u < 0) return best;
  const Simd::Float change = Simd::broadcast(best.change);
  best.p = first_column(group, [&](int64_t col) {
    return Simd::equal(Simd::bits(changes(block, r, best.u, col)), Simd::bits(change));
  });
  return best;
}

// As the reference does it, for numbers so large that changes may be NaN: then there is no swap.
inline Swap best_swap_of_all(const MaskBlock& block, const SwapRow& r, const Group& group) {
  Swap best;
  for (int64_t u = group.first; u < group.end; ++u) {
    for (int64_t p = group.first; p < group.end; ++p) {
      const float pair = (r.twice[u] * r.w[p]) * block.h[u * block.h_stride + p];
      const float change = (r.prune[u] + r.keep[p]) - pair;
      if (std::isnan(change)) return {};
      if (change < best.change) best = {change, u, p};
    }
  }
  return best;
}

inline void make_swap(const MaskBlock& block, const Swap& swap, int64_t first, SwapRow& r) {
  const float *const gained = block.h + swap.u * block.h_stride, *const lost = block.h + swap.p * block.h_stride;
  const Simd::Float w_u = Simd::broadcast(r.w[swap.u]), w_p = Simd::broadcast(r.w[swap.p]);
  for (int64_t col = first; col < block.w.n_cols; col += kWidth) {
    const Simd::Float c = Simd::add(Simd::load(r.c + col), Simd::multiply(w_u, Simd::load(gained + col)));
    Simd::store(r.c + col, Simd::subtract(c, Simd::multiply(w_p, Simd::load(lost + col))));
  }
  r.pruned[swap.u] = -1;
  r.pruned[swap.p] = 0;
}

// Returns whether the mask changed.
inline bool refine_row(const MaskBlock& block, const SwapBounds& bounds, SwapRow& r) {
  bool changed = false;
  for (int64_t first = 0; first < block.w.n_cols; first += block.m) {
    const int64_t end = smaller<int64_t>(first + block.m, block.w.n_cols);
    const Group group = {first, end, first + round_up(end - first, kWidth)};
    float largest_w = 1;
    for (int64_t col = first; col < end; ++col) largest_w = larger(largest_w, std::fabs(r.w[col]));
    for (int i = 0; i < block.m; ++i) {
      const Lowest lowest = weigh(group, r);
      const bool is_finite = 4 * largest_w * (largest_w * bounds.largest + lowest.c) < FLT_MAX;
      const Swap swap =
          is_finite ? best_swap(block, r, group, lowest.bound) : best_swap_of_all(block, r, group);
      if (swap.u < 0) break;
      make_swap(block, swap, first, r);
      changed = true;
    }
  }
  return changed;
}

inline void refine_swaps(const MaskBlock& block, const SwapBounds& bounds, int64_t begin, int64_t end) {
  SwapRow r;
  for (int64_t row = begin; row < end; ++row) {
    load_row(block, bounds, row, r);
    if (!refine_row(block, bounds, r)) continue;
    uint8_t* pruned = block.pruned + row * block.pruned_stride;
    for (int64_t col = 0; col < block.w.n_cols; ++col) pruned[col] = static_cast<uint8_t>(-r.pruned[col]);
  }
}

}  // namespace WANDA_ISA
