// The steps that all selections share: a row's weights to int32 keys, and one prune bit per column back to the weights.
// Only this file knows the weights' dtype; the selections see keys.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace WANDA_ISA {

using wanda::DType;
using wanda::Matrix;
using wanda::Selection;

constexpr int kWidth = Simd::kWidth;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One thread's scratch for rows of n_cols.
struct Scratch {
  int32_t* keys;  // has room for a whole vector of groups past the row
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

// The key of a score. The product of a weight and a root has the weight's sign, which is dropped here.
inline Simd::Int key_of(Simd::Float score) {
  const Simd::Int magnitude = Simd::bit_and(Simd::bits(score), Simd::broadcast(0x7fffffff));
  return Simd::min(magnitude, Simd::broadcast(wanda::kNaNKey));
}

inline const float* tail_of(const float* p, int64_t begin, int64_t n, float* tail) {
  if (p == nullptr) return nullptr;
  memcpy(tail, p + begin, n * sizeof(float));
  return tail;
}

template <typename T, typename Body>
void visit_vectors(T* w, int64_t n, int64_t first, const float* root, const float* scale, const float* divisor,
                   const Body& body) {
  if (root != nullptr) {
    body(w, VectorRoot{root}, n, first);
  } else if (scale != nullptr) {
    body(w, MatrixScale{scale}, n, first);
  } else if (divisor != nullptr) {
    body(w, SquareOver{divisor}, n, first);
  } else {
    body(w, NoScale{}, n, first);
  }
}

// body(w, scale, n, first) for n weights from column `first` on, n a multiple of kWidth. The rest of the row is passed
// as a padded copy, so that nothing is read past the row. The copy is written back unless T is const.
template <typename T, typename Body>
void visit_scored(T* w, int64_t n_cols, const float* root, const float* scale, const float* divisor,
                  const Body& body) {
  const int64_t whole = n_cols / kWidth * kWidth, left = n_cols - whole;
  visit_vectors(w, whole, 0, root, scale, divisor, body);
  if (left == 0) return;
  std::remove_const_t<T> w_tail[kWidth] = {};
  float root_tail[kWidth] = {}, scale_tail[kWidth] = {}, divisor_tail[kWidth] = {};
  memcpy(w_tail, w + whole, left * sizeof(T));
  visit_vectors<T>(w_tail, kWidth, whole, tail_of(root, whole, left, root_tail),
                   tail_of(scale, whole, left, scale_tail), tail_of(divisor, whole, left, divisor_tail), body);
  if constexpr (!std::is_const_v<T>) memcpy(w + whole, w_tail, left * sizeof(T));
}

template <typename T>
T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}

inline const float* scale_of(const Selection& s, int64_t row) {
  return s.scale == nullptr ? nullptr : s.scale + row * s.scale_stride;
}

// body(w) with w a pointer to the row's weights in their own type.
template <typename Body>
void with_row(const Matrix& matrix, int64_t row, const Body& body) {
  switch (matrix.dtype) {
    case DType::kFloat: body(row_of<float>(matrix, row)); break;
    case DType::kHalf: body(row_of<Half>(matrix, row)); break;
    case DType::kBFloat: body(row_of<BFloat>(matrix, row)); break;
  }
}

struct Range {
  int32_t low, high;
};

// Writes the keys of a row, and kPaddingKey up to `padded` columns. Returns a lower bound on all keys and the largest.
inline Range row_keys(const Selection& s, int64_t row, int64_t padded, int32_t* keys) {
  const int64_t n_cols = s.weight.n_cols;
  Simd::Int low = Simd::broadcast(wanda::kPaddingKey), high = Simd::broadcast(0);
  with_row(s.weight, row, [&](const auto* w) {
    visit_scored(w, n_cols, s.root, scale_of(s, row), s.divisor,
                 [&](const auto* w, const auto scale, int64_t n, int64_t first) {
                   Simd::Int lowest = low, highest = high;
                   for (int64_t col = 0; col < n; col += kWidth) {
                     const Simd::Int key = key_of(scale.score(Simd::load(w + col), col));
                     Simd::store(keys + first + col, key);
                     lowest = Simd::min(lowest, key);
                     highest = Simd::max(highest, key);
                   }
                   low = lowest;
                   high = highest;
                 });
  });
  for (int64_t col = n_cols; col < padded; ++col) keys[col] = wanda::kPaddingKey;
  return {Simd::lowest(low), Simd::highest(high)};
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

// body(w, col) for each vector of a row. A last partial vector is a padded copy, which is written back.
template <typename T, typename Body>
void each_vector(T* w, int64_t n_cols, const Body& body) {
  const int64_t whole = n_cols / kWidth * kWidth, left = n_cols - whole;
  for (int64_t col = 0; col < whole; col += kWidth) body(w + col, col);
  if (left == 0) return;
  T tail[kWidth] = {};
  memcpy(tail, w + whole, left * sizeof(T));
  body(tail, whole);
  memcpy(w + whole, tail, left * sizeof(T));
}

// Writes the packed mask of a row, if the caller wants one.
inline void emit_mask(const Selection& s, int64_t row, const uint8_t* pruned) {
  if (s.mask == nullptr) return;
  const int64_t n_cols = s.weight.n_cols, n_bytes = round_up(n_cols, 8) / 8;
  uint8_t* mask = s.mask + row * n_bytes;
  for (int64_t i = 0; i < n_bytes; ++i) mask[i] = static_cast<uint8_t>(~pruned[i]);
  if (n_cols % 8) mask[n_bytes - 1] &= static_cast<uint8_t>((1 << n_cols % 8) - 1);
}

// Writes +0.0 where a bit of `pruned` is set.
inline void apply_row(const Selection& s, int64_t row, const uint8_t* pruned) {
  with_row(s.weight, row, [&](auto* w) {
    each_vector(w, s.weight.n_cols, [&](auto* w, int64_t col) { Simd::zero_where(load_bits(pruned, col), w); });
  });
  emit_mask(s, row, pruned);
}

// The number of keys below the pivot. Four sums hide the latency of an addition. `padded` is a multiple of kWidth.
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

}  // namespace WANDA_ISA
