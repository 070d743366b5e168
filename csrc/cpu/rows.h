// From weights to keys, and from a row of prune bits back to weights. What lies between is in the kernels' files and
// knows no dtype: a selection turns int32 keys into one bit a column, 1 = pruned.
#pragma once

#include "kernels_cpu.h"

namespace WANDA_ISA {

using wanda::DType;
using wanda::Matrix;
using wanda::Selection;

constexpr int kWidth = Simd::kWidth;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The scratch of one thread, cut up for rows of n_cols.
struct Scratch {
  int32_t* keys;  // room for a whole vector of groups past the row
  int64_t* masses;
  uint8_t* pruned;

  Scratch(void* memory, int64_t n_cols) {
    masses = static_cast<int64_t*>(memory);
    keys = reinterpret_cast<int32_t*>(masses + round_up(n_cols, 8));
    pruned = reinterpret_cast<uint8_t*>(keys + n_cols + wanda::cpu::kMaxWidth * wanda::cpu::kMaxGroup);
  }
};

struct NoScale {
  Simd::Float score(Simd::Float w, int64_t) const { return w; }
};
struct VectorRoot {
  const float* root;
  Simd::Float score(Simd::Float w, int64_t col) const { return Simd::multiply(w, Simd::load(root + col)); }
};
struct MatrixScale {
  const float* scale;
  Simd::Float score(Simd::Float w, int64_t col) const {
    return Simd::multiply(w, Simd::sqrt(Simd::load(scale + col)));
  }
};
struct SquareOver {
  const float* divisor;
  Simd::Float score(Simd::Float w, int64_t col) const {
    return Simd::divide(Simd::multiply(w, w), Simd::load(divisor + col));
  }
};

// The sign goes after the product, which leaves its magnitude the same.
inline Simd::Int key_of(Simd::Float score) {
  const Simd::Int magnitude = Simd::bit_and(Simd::bits(score), Simd::broadcast(0x7fffffff));
  return Simd::min(magnitude, Simd::broadcast(wanda::kNaNKey));
}

template <typename T, typename Scale>
void keys_of(const T* w, int64_t n_cols, Scale scale, int32_t* keys) {
  for (int64_t col = 0; col < n_cols; col += kWidth) {
    Simd::store(keys + col, key_of(scale.score(Simd::load(w + col), col)));
  }
}

inline const float* tail_of(const float* p, int64_t begin, int64_t n, float* tail) {
  if (p == nullptr) return nullptr;
  memcpy(tail, p + begin, n * sizeof(float));
  return tail;
}

// Whole vectors from the row itself, the rest from a padded copy: nothing is read past the row.
template <typename T>
void keys_of_row(const T* w, int64_t n_cols, const float* root, const float* scale, const float* divisor,
                 int32_t* keys) {
  const int64_t whole = n_cols / kWidth * kWidth;
  if (root != nullptr) {
    keys_of(w, whole, VectorRoot{root}, keys);
  } else if (scale != nullptr) {
    keys_of(w, whole, MatrixScale{scale}, keys);
  } else if (divisor != nullptr) {
    keys_of(w, whole, SquareOver{divisor}, keys);
  } else {
    keys_of(w, whole, NoScale{}, keys);
  }
  if (whole == n_cols) return;
  T w_tail[kWidth] = {};
  float root_tail[kWidth] = {}, scale_tail[kWidth] = {}, divisor_tail[kWidth] = {};
  memcpy(w_tail, w + whole, (n_cols - whole) * sizeof(T));
  keys_of_row(w_tail, kWidth, tail_of(root, whole, n_cols - whole, root_tail),
              tail_of(scale, whole, n_cols - whole, scale_tail), tail_of(divisor, whole, n_cols - whole, divisor_tail),
              keys + whole);
}

template <typename T>
T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}

// Keys of a row, padded to `padded` columns with keys that no selection prunes.
inline void row_keys(const Selection& s, int64_t row, int64_t padded, int32_t* keys) {
  const int64_t n_cols = s.weight.n_cols;
  const float* scale = s.scale == nullptr ? nullptr : s.scale + row * s.scale_stride;
  switch (s.weight.dtype) {
    case DType::kFloat: keys_of_row(row_of<float>(s.weight, row), n_cols, s.root, scale, s.divisor, keys); break;
    case DType::kHalf: keys_of_row(row_of<Half>(s.weight, row), n_cols, s.root, scale, s.divisor, keys); break;
    case DType::kBFloat: keys_of_row(row_of<BFloat>(s.weight, row), n_cols, s.root, scale, s.divisor, keys); break;
  }
  for (int64_t col = n_cols; col < padded; ++col) keys[col] = wanda::kPaddingKey;
}

inline uint32_t load_bits(const uint8_t* pruned, int64_t col) {
  if (kWidth == 8) return pruned[col / 8];
  uint16_t bits;
  memcpy(&bits, pruned + col / 8, sizeof bits);
  return bits;
}

inline void store_bits(uint8_t* pruned, int64_t col, uint32_t bits) {
  if (kWidth == 8) {
    pruned[col / 8] = static_cast<uint8_t>(bits);
  } else {
    const uint16_t low = static_cast<uint16_t>(bits);
    memcpy(pruned + col / 8, &low, sizeof low);
  }
}

template <typename T>
void zero_pruned(T* w, int64_t n_cols, const uint8_t* pruned) {
  const int64_t whole = n_cols / kWidth * kWidth;
  for (int64_t col = 0; col < whole; col += kWidth) Simd::zero_where(load_bits(pruned, col), w + col);
  for (int64_t col = whole; col < n_cols; ++col) {
    if (pruned[col / 8] >> col % 8 & 1) w[col] = T{};
  }
}

// Write +0.0 where a bit of `pruned` is set; emit the packed mask if one is asked for.
inline void apply_row(const Selection& s, int64_t row, const uint8_t* pruned) {
  const int64_t n_cols = s.weight.n_cols;
  switch (s.weight.dtype) {
    case DType::kFloat: zero_pruned(row_of<float>(s.weight, row), n_cols, pruned); break;
    case DType::kHalf: zero_pruned(row_of<Half>(s.weight, row), n_cols, pruned); break;
    case DType::kBFloat: zero_pruned(row_of<BFloat>(s.weight, row), n_cols, pruned); break;
  }
  if (s.mask == nullptr) return;
  const int64_t n_bytes = round_up(n_cols, 8) / 8;
  uint8_t* mask = s.mask + row * n_bytes;
  for (int64_t i = 0; i < n_bytes; ++i) mask[i] = static_cast<uint8_t>(~pruned[i]);
  if (n_cols % 8) mask[n_bytes - 1] &= static_cast<uint8_t>((1 << n_cols % 8) - 1);
}

// How many of the keys are below the pivot; four sums hide the latency. `padded` is a multiple of kWidth.
inline int64_t count_below(const int32_t* keys, int64_t padded, int32_t pivot) {
  const Simd::Int bound = Simd::broadcast(pivot);
  Simd::Int count[4] = {Simd::broadcast(0), Simd::broadcast(0), Simd::broadcast(0), Simd::broadcast(0)};
  int64_t col = 0;
  for (; col + 4 * kWidth <= padded; col += 4 * kWidth) {
    for (int i = 0; i < 4; ++i) {
      count[i] = Simd::increment_where(Simd::less(Simd::load(keys + col + i * kWidth), bound), count[i]);
    }
  }
  for (; col < padded; col += kWidth) {
    count[0] = Simd::increment_where(Simd::less(Simd::load(keys + col), bound), count[0]);
  }
  return Simd::sum(Simd::add(Simd::add(count[0], count[1]), Simd::add(count[2], count[3])));
}

struct Range {
  int32_t low, high;
};

inline Range range_of(const int32_t* keys, int64_t n_cols) {
  Simd::Int low = Simd::broadcast(wanda::kPaddingKey), high = Simd::broadcast(0);
  const int64_t whole = n_cols / kWidth * kWidth;
  for (int64_t col = 0; col < whole; col += kWidth) {
    const Simd::Int key = Simd::load(keys + col);
    low = Simd::min(low, key);
    high = Simd::max(high, key);
  }
  Range range = {Simd::lowest(low), Simd::highest(high)};
  for (int64_t col = whole; col < n_cols; ++col) {
    range.low = smaller(range.low, keys[col]);
    range.high = larger(range.high, keys[col]);
  }
  return range;
}

}  // namespace WANDA_ISA
