// acc += a^T b over tokens, with fp32 sums. Each token_product_*.cpp includes its simd_*.h and then this file.
// Operands are fp32, or a type that the including file adds.
#pragma once

#include <algorithm>
#include <utility>

#include "token_product.h"

namespace WANDA_ISA {

using wanda::Matrix;

constexpr int64_t kPanel = Simd::kWidth;
// A tile of sums is kRows x kVectors vectors, which takes three quarters of the registers.
constexpr int kRows = 4, kVectors = kPanel == 16 ? 6 : 3;
// Panels of a per call. Measured with AVX2 only.
constexpr int64_t kPanelsAtOnce = kPanel == 16 ? 1 : 8;
// Units that are summed before they are added to acc: a strip of b stays in L1, and short fp32 sums lose little.
constexpr int64_t kUnits = kPanel == 16 ? 128 : 256;

struct Fp32 {
  static constexpr int kTokens = 1;
  static Simd::Int pack(const float* token, const float*, Simd::Mask inside) {
    return Simd::bits(Simd::load_where(inside, token));
  }
  static Simd::Float multiply_add(Simd::Float sum, Simd::Int a, Simd::Int b) {
    return Simd::multiply_add(Simd::as_float(a), Simd::as_float(b), sum);
  }
};

inline Simd::Int load_words(const uint32_t* p) { return Simd::load(reinterpret_cast<const int32_t*>(p)); }

// acc[kRows, kPanel * kCount] += the sum over n_units. a points at a row of one panel, b at kCount panels of b_units
// each.
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
// Unrolled, so that the sums stay in registers.
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    if (row >= n_rows) break;
    for (int each = 0; each < kCount; ++each) {
      const int64_t left = n_cols - each * kPanel;
      float* target = acc + row * stride + each * kPanel;
      // Masked stores take a dozen cycles or more on AMD's cores.
      if (left >= kPanel) {
        Simd::store(target, Simd::add(Simd::load(target), sums[row][each]));
      } else {
        const Simd::Mask inside = Simd::first(left);
        Simd::store_where(inside, target, Simd::add(Simd::load_where(inside, target), sums[row][each]));
      }
    }
  }
}

using AddTile = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, int64_t, int64_t, int64_t);

// The kernel for a tile of n_vectors, from 1 to kVectors.
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

// All of a is multiplied with one vertical strip of b before the next strip: kUnits of a strip stay in L1, a in L2.
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

// T packs and multiplies tokens.
template <typename T>
constexpr wanda::cpu::TokenProduct token_product() {
  return {
      .panel = kPanel,
      .tokens = T::kTokens,
      .panels_at_once = kPanelsAtOnce,
      .pack_panel = pack_panel<T>,
      .add_panels = add_panels<T>,
  };
}

}  // namespace WANDA_ISA
