// acc += a^T b over tokens with AVX-512, sums in fp32, operands fp32 or rounded to bf16, whose one instruction
// multiplies and adds 32 pairs: twice the rate of fp32.
#if defined(__x86_64__)
#include "token_product.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

#include <algorithm>

namespace wanda::cpu {
namespace {

constexpr int kRows = 4, kVectors = 6;  // of a tile: 24 of the 32 registers hold its sums
constexpr int64_t kUnits = 128;         // summed before they join acc: short chains of fp32 lose less

struct Single {
  static constexpr int kTokens = 1;
  static __m512i pack(const float* token, const float*, __mmask16 inside) {
    return _mm512_maskz_loadu_epi32(inside, token);
  }
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

struct Brain {
  static constexpr int kTokens = 2;
  static __m512i pack(const float* even, const float* odd, __mmask16 inside) {
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, even));
    if (odd == nullptr) return _mm512_cvtepu16_epi32(low);
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, odd));
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

// acc[kRows, 16 * kCount] += over the units; a: one panel at its row, b: neighbouring panels of b_units each.
template <typename T, int kCount>
void add_tile(const uint32_t* a, const uint32_t* b, int64_t n_units, int64_t b_units, float* acc, int64_t stride,
              int64_t n_rows, int64_t n_cols) {
  __m512 sums[kRows][kCount];
  for (int row = 0; row < kRows; ++row) {
    for (int each = 0; each < kCount; ++each) sums[row][each] = _mm512_setzero_ps();
  }
  for (int64_t unit = 0; unit < n_units; ++unit) {
    __m512i columns[kCount];
    for (int each = 0; each < kCount; ++each) {
      columns[each] = _mm512_loadu_si512(b + (each * b_units + unit) * kPanel);
    }
    for (int row = 0; row < kRows; ++row) {
      const __m512i value = _mm512_set1_epi32(static_cast<int>(a[unit * kPanel + row]));
      for (int each = 0; each < kCount; ++each) {
        sums[row][each] = T::multiply_add(sums[row][each], value, columns[each]);
      }
    }
  }
  for (int row = 0; row < kRows && row < n_rows; ++row) {
    for (int each = 0; each < kCount; ++each) {
      const int64_t left = std::min<int64_t>(n_cols - each * kPanel, kPanel);
      const __mmask16 inside = static_cast<__mmask16>((1u << left) - 1);
      float* target = acc + row * stride + each * kPanel;
      _mm512_mask_storeu_ps(target, inside, _mm512_add_ps(_mm512_maskz_loadu_ps(inside, target), sums[row][each]));
    }
  }
}

using AddTile = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, int64_t, int64_t, int64_t);
template <typename T>
constexpr AddTile kAddTile[] = {add_tile<T, 1>, add_tile<T, 2>, add_tile<T, 3>,
                                add_tile<T, 4>, add_tile<T, 5>, add_tile<T, 6>};

template <typename T>
void pack(const Matrix& x, int64_t panel, uint32_t* words) {
  const int64_t begin = panel * kPanel, n = std::min(x.n_cols - begin, kPanel);
  const __mmask16 inside = static_cast<__mmask16>((1u << n) - 1);
  const float* values = static_cast<const float*>(x.data) + begin;
  for (int64_t row = 0; row < x.n_rows; row += T::kTokens, words += kPanel) {
    const float* even = values + row * x.stride;
    _mm512_storeu_si512(words, T::pack(even, row + 1 < x.n_rows ? even + x.stride : nullptr, inside));
  }
}

}  // namespace

extern const bool kTokenProductCompiled = true;

void pack_panel(const Matrix& x, int64_t panel, bool in_bf16, uint32_t* words) {
  if (in_bf16) pack<Brain>(x, panel, words);
  else pack<Single>(x, panel, words);
}

void add_panel_product(const uint32_t* a, const uint32_t* b, int64_t n_units, bool in_bf16, float* acc,
                       int64_t stride, int64_t n_rows, int64_t n_cols) {
  const AddTile* const tiles = in_bf16 ? kAddTile<Brain> : kAddTile<Single>;
  for (int64_t col = 0; col < n_cols; col += kVectors * kPanel) {
    const int64_t n_panels = std::min<int64_t>(kVectors, panels_of(n_cols - col));
    for (int64_t row = 0; row < n_rows; row += kRows) {
      for (int64_t unit = 0; unit < n_units; unit += kUnits) {
        tiles[n_panels - 1](a + unit * kPanel + row, b + col * n_units + unit * kPanel, std::min(kUnits, n_units - unit),
                            n_units, acc + row * stride + col, stride, n_rows - row, n_cols - col);
      }
    }
  }
}

}  // namespace wanda::cpu
#else
namespace wanda::cpu {

extern const bool kTokenProductCompiled = false;
void pack_panel(const Matrix&, int64_t, bool, uint32_t*) {}
void add_panel_product(const uint32_t*, const uint32_t*, int64_t, bool, float*, int64_t, int64_t, int64_t) {}

}  // namespace wanda::cpu
#endif
#endif
