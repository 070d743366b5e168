// A product with packed rows, and their unpacking, for one instruction set.
//
// A step takes as many bits of a row as a vector, or two, has lanes. It expands the row's next values to these lanes
// and adds their products with x to the row's sums, one for each lane. Where x is finite, the products of pruned
// weights are zeros and change no sum. Otherwise x is set to zero there.
//
// Needs Simd, and for each element type a struct: Element, kStep (columns), kParts (vectors of a step), slot(column of
// a step) = its place in them, and
//   expand(values, mask, parts) = popcount(mask): reads kStep values, of which it uses so many;
//   keep(mask, part, x): x, or +0.0 in lanes without a value.
#pragma once

#include <algorithm>
#include <vector>

#include "packed_rows.h"

namespace WANDA_ISA {

using wanda::Matrix;
using wanda::PackedLinear;
using wanda::PackedRows;

constexpr int64_t kRowBlock = 4;  // rows of the weight that share loads of x
constexpr int64_t kLongBlock = 32 << 10;  // bytes of a block whose values the processor prefetches better by itself
constexpr int kPrefetchBytes = 8;  // of bits: half of 64 weights are one or two cache lines

inline int64_t bytes_of(int64_t n_cols) { return (n_cols + 7) / 8; }

// To nearest, ties to even. A NaN stays a NaN.
template <typename T>
T rounded_to(float value);
template <>
inline float rounded_to(float value) {
  return value;
}
template <>
inline BFloat rounded_to(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half rounded_to(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value)), sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) half = 0x7e00;
  else if (magnitude >= 0x477ff000) half = 0x7c00;  // from halfway to the power of two past the largest
  else if (magnitude >= 0x38800000) half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Subnormal: the sum's last bit is that of the result.
  else half = static_cast<uint32_t>(bits_of(float_of(static_cast<int32_t>(magnitude)) + 0.5f)) - 0x3f000000;
  return {static_cast<uint16_t>(sign | half)};
}

// How many rows of x, from `first` on, are multiplied at once: at most T::kMostX; groups differ by at most one row.
template <typename T>
int group_of(int64_t n_x, int64_t first, bool finite) {
  if (!finite) return 1;
  const int64_t left = n_x - first, n_groups = (left + T::kMostX - 1) / T::kMostX;
  return static_cast<int>((left + n_groups - 1) / n_groups);
}

// Floats that a row of x takes in the prepared order.
template <typename T>
int64_t padded(int64_t n_cols) {
  return (n_cols + T::kStep - 1) / T::kStep * T::kStep;
}

// [groups][steps][rows of the group][slots of a step], padded with zeros.
template <typename T>
bool prepare_x(const PackedLinear& s, bool finite, float* x) {
  const int64_t n_cols = s.x.n_cols, width = padded<T>(n_cols);
  std::fill_n(x, s.x.n_rows * width, 0.0f);
  int32_t largest = 0;
  for (int64_t first = 0; first < s.x.n_rows;) {
    const int n = group_of<T>(s.x.n_rows, first, finite);
    for (int i = 0; i < n; ++i) {
      const auto* const row = static_cast<const typename T::Element*>(s.x.data) + (first + i) * s.x.stride;
      for (int64_t col = 0; col < n_cols; col += T::kStep) {
        float* const step = x + col * n + i * T::kStep;
        const int64_t inside = std::min<int64_t>(T::kStep, n_cols - col);
        for (int64_t j = 0; j < inside; ++j) {
          const float value = to_float(row[col + j]);
          largest = std::max(largest, bits_of(value) & 0x7fffffff);
          step[T::slot(j)] = value;
        }
      }
    }
    x += n * width;
    first += n;
  }
  return largest < 0x7f800000;
}

// Where a row's bits and values begin.
template <typename Element>
struct Row {
  const uint8_t* bits;
  const Element* values;
};

// The rows of a packed matrix, such that `margin` elements past a row's last value can be read.
template <typename Element>
class Rows {
 public:
  Rows(const PackedRows& s, int64_t margin)
      : s_(s), reach_(8 * bytes_of(s.n_cols) + margin), values_(static_cast<const Element*>(s.values)) {}

  // Whether bits of any kind keep the kernel inside of `values`.
  bool reach_is_inside(int64_t row) const { return begin(row) + reach_ <= s_.n_values; }
  Row<Element> in_place(int64_t row) const { return {bits(row), values_ + begin(row)}; }
  // The next call overwrites the copy.
  Row<Element> copied(int64_t row) {
    copy_.assign(reach_, Element{});
    std::copy_n(values_ + begin(row), std::min(reach_, s_.n_values - begin(row)), copy_.begin());
    return {bits(row), copy_.data()};
  }
  Row<Element> at(int64_t row) { return reach_is_inside(row) ? in_place(row) : copied(row); }

 private:
  const uint8_t* bits(int64_t row) const { return s_.bits + row * bytes_of(s_.n_cols); }
  int64_t begin(int64_t row) const {
    return s_.offsets ? std::clamp<int64_t>(s_.offsets[row], 0, s_.n_values) : row * s_.row_values;
  }

  const PackedRows& s_;
  const int64_t reach_;
  const Element* const values_;
  std::vector<Element> copy_;
};

template <typename T>
uint32_t mask_of(const uint8_t* bits, int64_t n_bytes) {
  uint32_t mask = 0;
  memcpy(&mask, bits, n_bytes);
  return mask;
}

// sums[kRows][kX] = rows times the rows of x in a group. The values `ahead` of those in use are prefetched.
template <typename T, int kRows, int kX, bool kFinite>
void multiply_tile(const Row<typename T::Element>* rows, int64_t n_bytes, const float* x, int64_t ahead, float* sums) {
  using Element = typename T::Element;
  constexpr int kMaskBytes = T::kStep / 8;
  Simd::Float acc[kRows][kX];
  const Element* values[kRows];
  const uint8_t* bits[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    values[r] = rows[r].values;
    bits[r] = rows[r].bits;
#pragma GCC unroll 4
    for (int i = 0; i < kX; ++i) acc[r][i] = Simd::broadcast(0.0f);
  }
  const auto add_step = [&](int64_t byte, int64_t mask_bytes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const uint32_t mask = mask_of<T>(bits[r] + byte, mask_bytes);
      Simd::Float weights[T::kParts];
      values[r] += T::expand(values[r], mask, weights);
#pragma GCC unroll 4
      for (int i = 0; i < kX; ++i) {
#pragma GCC unroll 2
        for (int part = 0; part < T::kParts; ++part) {
          Simd::Float own = Simd::load(x + i * T::kStep + part * Simd::kWidth);
          if (!kFinite) own = T::keep(mask, part, own);
          acc[r][i] = Simd::multiply_add(weights[part], own, acc[r][i]);
        }
      }
    }
    x += kX * T::kStep;
  };
  int64_t byte = 0;
  for (; byte + kPrefetchBytes <= n_bytes; byte += kPrefetchBytes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      for (size_t line = 0; line < sizeof(Element) / 2; ++line) {
        __builtin_prefetch(reinterpret_cast<const char*>(values[r] + ahead) + 64 * line, 0, 2);
      }
    }
#pragma GCC unroll 1
    for (int step = 0; step < kPrefetchBytes; step += kMaskBytes) add_step(byte + step, kMaskBytes);
  }
#pragma GCC unroll 1
  for (; byte + kMaskBytes <= n_bytes; byte += kMaskBytes) add_step(byte, kMaskBytes);
  if (byte < n_bytes) add_step(byte, n_bytes - byte);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kX; ++i) sums[r * kX + i] = sum_of_pairs(acc[r][i]);
  }
}

// Rows [row, row + n) of the weight, times kX rows of x from `first` on.
template <typename T, int kX, bool kFinite>
void multiply_block(const PackedLinear& s, const Row<typename T::Element>* rows, int64_t n, const float* x,
                    int64_t first, int64_t row) {
  using Element = typename T::Element;
  constexpr int kTile = kX <= 2 ? 4 : 2;  // as many as leave room in the registers
  float sums[kRowBlock * kX];
  const int64_t n_bytes = bytes_of(s.weight.n_cols);
  // The next block's values lie behind those of this one.
  const int64_t of_block = n > 1 ? (rows[n - 1].values - rows[0].values) / (n - 1) * n : 0;
  const int64_t ahead = of_block * static_cast<int64_t>(sizeof(Element)) < kLongBlock ? of_block : 0;
  int64_t r = 0;
  for (; r + kTile <= n; r += kTile) multiply_tile<T, kTile, kX, kFinite>(rows + r, n_bytes, x, ahead, sums + r * kX);
  for (; r < n; ++r) multiply_tile<T, 1, kX, kFinite>(rows + r, n_bytes, x, ahead, sums + r * kX);
  for (int i = 0; i < kX; ++i) {
    Element* const out = static_cast<Element*>(s.out.data) + (first + i) * s.out.stride + row;
    for (r = 0; r < n; ++r) {
      const float bias = s.bias ? to_float(static_cast<const Element*>(s.bias)[row + r]) : 0.0f;
      out[r] = rounded_to<Element>(sums[r * kX + i] + bias);
    }
  }
}

template <typename T>
void multiply_groups(const PackedLinear& s, bool finite, const Row<typename T::Element>* rows, int64_t n,
                     const float* x, int64_t row) {
  const int64_t width = padded<T>(s.x.n_cols);
  for (int64_t first = 0; first < s.x.n_rows;) {
    const int n_x = group_of<T>(s.x.n_rows, first, finite);
    auto multiply = finite ? multiply_block<T, 1, true> : multiply_block<T, 1, false>;
    if constexpr (T::kMostX > 1) {
      if (n_x == 2) multiply = multiply_block<T, 2, true>;
      if (n_x == 3) multiply = multiply_block<T, 3, true>;
      if (n_x == 4) multiply = multiply_block<T, 4, true>;
    }
    multiply(s, rows, n, x + first * width, first, row);
    first += n_x;
  }
}

template <typename T>
void multiply_rows(const PackedLinear& s, bool finite, const float* x, int64_t begin, int64_t end) {
  using Element = typename T::Element;
  Rows<Element> all(s.weight, T::kStep);
  Row<Element> rows[kRowBlock];
  for (int64_t row = begin; row < end;) {
    int64_t n = 0;
    for (; n < kRowBlock && row + n < end && all.reach_is_inside(row + n); ++n) rows[n] = all.in_place(row + n);
    if (n == 0) rows[n++] = all.copied(row);
    multiply_groups<T>(s, finite, rows, n, x, row);
    row += n;
  }
}

// Unpacks 8 columns at a time.
template <typename T>
void unpack_elements(const PackedRows& s, void* out, int64_t begin, int64_t end) {
  using Element = typename T::Element;
  Rows<Element> all(s, 8);
  for (int64_t row = begin; row < end; ++row) {
    const Row<Element> from = all.at(row);
    const Element* values = from.values;
    Element* const to = static_cast<Element*>(out) + row * s.n_cols;
    int64_t col = 0;
    for (; col + 8 <= s.n_cols; col += 8) {
      const uint32_t mask = from.bits[col / 8];
      values += T::expand(values, mask, to + col);
    }
    if (col < s.n_cols) {
      Element last[8];
      T::expand(values, from.bits[col / 8], last);
      std::copy_n(last, s.n_cols - col, to + col);
    }
  }
}

// Elements of any size, one by one.
template <typename T>
struct EachElement {
  using Element = T;
  static int expand(const T* values, uint32_t mask, T* out) {
    int count = 0;
    for (int i = 0; i < 8; ++i) {
      const T has_value = mask >> i & 1;
      out[i] = values[count] & static_cast<T>(0 - has_value);
      count += static_cast<int>(has_value);
    }
    return count;
  }
};

template <typename OfFloat, typename OfHalf, typename OfBFloat, typename Two, typename Four>
struct Packed {
  static bool prepare(const PackedLinear& s, bool finite, float* x) {
    switch (s.x.dtype) {
      case wanda::DType::kFloat: return prepare_x<OfFloat>(s, finite, x);
      case wanda::DType::kHalf: return prepare_x<OfHalf>(s, finite, x);
      default: return prepare_x<OfBFloat>(s, finite, x);
    }
  }
  static void multiply(const PackedLinear& s, bool finite, const float* x, int64_t begin, int64_t end) {
    switch (s.x.dtype) {
      case wanda::DType::kFloat: return multiply_rows<OfFloat>(s, finite, x, begin, end);
      case wanda::DType::kHalf: return multiply_rows<OfHalf>(s, finite, x, begin, end);
      default: return multiply_rows<OfBFloat>(s, finite, x, begin, end);
    }
  }
  static void unpack(const PackedRows& s, int element_bytes, void* out, int64_t begin, int64_t end) {
    switch (element_bytes) {
      case 1: return unpack_elements<EachElement<uint8_t>>(s, out, begin, end);
      case 2: return unpack_elements<Two>(s, out, begin, end);
      case 4: return unpack_elements<Four>(s, out, begin, end);
      default: return unpack_elements<EachElement<uint64_t>>(s, out, begin, end);
    }
  }
  static constexpr wanda::cpu::PackedKernels kernels = {.prepare = prepare, .multiply = multiply, .unpack = unpack};
};

}  // namespace WANDA_ISA
