// acc += a^T b over tokens, operands rounded to bf16, sums in fp32: AVX512-BF16, whose one instruction multiplies and
// adds 32 pairs. Twice the rate of fp32 where the CPU has it.
#include "bf16_product.h"

#include <algorithm>

#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#include <immintrin.h>

#define WANDA_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace wanda::cpu {
namespace {

constexpr int kRows = 4, kVectors = 6;  // of a tile: 24 of the 32 registers hold its sums

WANDA_BF16 inline __m512i round_pair(const float* even, const float* odd, __mmask16 inside) {
  const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, even));
  if (odd == nullptr) return _mm512_cvtepu16_epi32(low);
  const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, odd));
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// acc[kRows, 16 * kCount] += over the pairs; a: one panel at its row, b: neighbouring panels.
template <int kCount>
WANDA_BF16 void add_tile(const uint32_t* a, const uint32_t* b, int64_t n_pairs, float* acc, int64_t stride,
                         int64_t n_rows, int64_t n_cols) {
  __m512 sums[kRows][kCount];
  for (int row = 0; row < kRows; ++row) {
    for (int each = 0; each < kCount; ++each) sums[row][each] = _mm512_setzero_ps();
  }
  for (int64_t pair = 0; pair < n_pairs; ++pair) {
    __m512bh columns[kCount];
    for (int each = 0; each < kCount; ++each) {
      columns[each] = (__m512bh)_mm512_loadu_si512(b + (each * n_pairs + pair) * kPanel);
    }
    for (int row = 0; row < kRows; ++row) {
      const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[pair * kPanel + row]));
      for (int each = 0; each < kCount; ++each) {
        sums[row][each] = _mm512_dpbf16_ps(sums[row][each], value, columns[each]);
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

using AddTile = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, int64_t, int64_t);
constexpr AddTile kAddTile[] = {add_tile<1>, add_tile<2>, add_tile<3>, add_tile<4>, add_tile<5>, add_tile<6>};

}  // namespace

bool has_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

WANDA_BF16 void pack_panel(const Matrix& x, int64_t panel, uint32_t* pairs) {
  const int64_t begin = panel * kPanel, n = std::min(x.n_cols - begin, kPanel);
  const __mmask16 inside = static_cast<__mmask16>((1u << n) - 1);
  const float* values = static_cast<const float*>(x.data) + begin;
  for (int64_t row = 0; row < x.n_rows; row += 2) {
    const float* even = values + row * x.stride;
    const float* odd = row + 1 < x.n_rows ? even + x.stride : nullptr;
    _mm512_storeu_si512(pairs + row / 2 * kPanel, round_pair(even, odd, inside));
  }
}

void add_panel_product(const uint32_t* a, const uint32_t* b, int64_t n_pairs, float* acc, int64_t stride,
                       int64_t n_rows, int64_t n_cols) {
  for (int64_t col = 0; col < n_cols; col += kVectors * kPanel) {
    const int64_t n_panels = std::min<int64_t>(kVectors, panels_of(n_cols - col));
    for (int64_t row = 0; row < n_rows; row += kRows) {
      kAddTile[n_panels - 1](a + row, b + col * n_pairs, n_pairs, acc + row * stride + col, stride, n_rows - row,
                             n_cols - col);
    }
  }
}

}  // namespace wanda::cpu

#else

namespace wanda::cpu {

bool has_bf16() { return false; }
void pack_panel(const Matrix&, int64_t, uint32_t*) {}
void add_panel_product(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, int64_t, int64_t) {}

}  // namespace wanda::cpu

#endif
