// acc += a^T b over tokens, sums in fp32. Included by one file for each instruction set, after its simd_*.h; operands
// are fp32, or what the file adds.
#pragma once

#include <algorithm>
#include <utility>

#include "token_product.h"

namespace WANDA_ISA {

using wanda::Matrix;

constexpr int64_t kPanel = Simd::kWidth;
constexpr int kRows = 4, kVectors = kPanel == 16 ? 6 : 3;  // of a tile: its sums take three quarters of the registers
constexpr int64_t kPanelsAtOnce = kPanel == 16 ? 1 : 8;  // of a; with AVX-512 not measured
// Summed before they join acc: a strip of b that stays in the first cache, in chains of fp32 that lose little.
constexpr int64_t kUnits = kPanel == 16 ? 128 : 256;

struct Single {
  static constexpr int kTokens = 1;
  static Simd::Int pack(const float* token, const float*, Simd::Mask inside) {
    return Simd::bits(Simd::load_where(inside, token));
  }
  static Simd::Float multiply_add(Simd::Float sum, Simd::Int a, Simd::Int b) {
    return Simd::multiply_add(Simd::as_float(a), Simd::as_float(b), sum);
  }
};

inline Simd::Int load_words(const uint32_t* p) { return Simd::load(reinterpret_cast<const int32_t*>(p)); }

// acc[kRows, kPanel * kCount] += over the units; a: one panel at its row, b: neighbouring panels of b_units each.
template <typename T, int kCount>
void add_tile(const uint32_t* a, const uint32_t* b, int64_t n_units, int64_t b_units, float* acc, int64_t stride,
              int64_t n_rows, int64_t n_cols) {
  Simd::Float sums[kRows][kCount];
  for (int row = 0; row < kRows; ++row) {
    for (int each = 0; each < kCount; ++each) sums[row][each] = Simd::broadcast(0.0f);
  }
  for (int64_t unit = 0; unit < n_units; ++unit) {
    Simd::Int columns[kCount];
    for (int each = 0; each < kCount; ++each) columns[each] = load_words(b + (each * b_units + unit) * kPanel);
    for (int row = 0; row < kRows; ++row) {
      const Simd::Int value = Simd::broadcast(static_cast<int32_t>(a[unit * kPanel + row]));
      for (int each = 0; each < kCount; ++each) {
        sums[row][each] = T::multiply_add(sums[row][each], value, columns[each]);
      }
    }
  }
#pragma GCC unroll 4  // keeps the sums in registers
  for (int row = 0; row < kRows; ++row) {
    if (row >= n_rows) break;
    for (int each = 0; each < kCount; ++each) {
      const int64_t left = n_cols - each * kPanel;
      float* target = acc + row * stride + each * kPanel;
      if (left >= kPanel) {  // masked stores take AMD's cores a dozen cycles and more
        Simd::store(target, Simd::add(Simd::load(target), sums[row][each]));
      } else {
        const Simd::Mask inside = Simd::first(left);
        Simd::store_where(inside, target, Simd::add(Simd::load_where(inside, target), sums[row][each]));
      }
    }
  }
}

using AddTile = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, int64_t, int64_t, int64_t);

// Tiles of 1 to kVectors vectors.
template <typename T, int... kBefore>
AddTile tile_of(int64_t n_vectors, std::integer_sequence<int, kBefore...>) {
  constexpr AddTile tiles[] = {add_tile<T, kBefore + 1>...};
  return tiles[n_vectors - 1];
}

template <typename T>
void pack_panel(const Matrix& x, int64_t panel, uint32_t* words) {
  const int64_t begin = panel * kPanel;
  const Simd::Mask inside = Simd::first(std::min(x.n_cols - begin, kPanel));
  const float* values = static_cast<const float*>(x.data) + begin;
  for (int64_t row = 0; row < x.n_rows; row += T::kTokens, words += kPanel) {
    const float* even = values + row * x.stride;
    const Simd::Int units = T::pack(even, row + 1 < x.n_rows ? even + x.stride : nullptr, inside);
    Simd::store(reinterpret_cast<int32_t*>(words), units);
  }
}

// A vertical strip of b meets all of a before the next: a strip's units of one chain stay in the first cache, a in
// the second.
template <typename T>
void add_panels(const uint32_t* a, const uint32_t* b, int64_t n_units, float* acc, int64_t stride, int64_t n_rows,
                int64_t n_cols, bool upper) {
  for (int64_t col = 0; col < n_cols; col += kVectors * kPanel) {
    const int64_t n_panels = std::min<int64_t>(kVectors, (n_cols - col + kPanel - 1) / kPanel);
    const AddTile add = tile_of<T>(n_panels, std::make_integer_sequence<int, kVectors>());
    const int64_t end = upper ? std::min(n_rows, col + n_panels * kPanel) : n_rows;
    for (int64_t unit = 0; unit < n_units; unit += kUnits) {
      for (int64_t row = 0; row < end; row += kRows) {
        add(a + (row / kPanel * n_units + unit) * kPanel + row % kPanel, b + (col * n_units + unit * kPanel),
            std::min(kUnits, n_units - unit), n_units, acc + row * stride + col, stride, n_rows - row, n_cols - col);
      }
    }
  }
}

// T: how tokens are packed and multiplied.
template <typename T>
constexpr wanda::cpu::TokenProduct token_product() {
  return {kPanel, T::kTokens, kPanelsAtOnce, pack_panel<T>, add_panels<T>};
}

}  // namespace WANDA_ISA
