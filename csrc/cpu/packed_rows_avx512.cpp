// Packed rows with AVX-512 VBMI2, whose expand instructions move the next values to their lanes. Values are loaded
// before they are expanded, since an expanding load is slow on some processors.
#if defined(__x86_64__)
#include "packed_rows.h"

#if defined(__AVX512VBMI2__)
#define WANDA_ISA wanda_packed_avx512
#include "simd_avx512.h"

namespace WANDA_ISA {

template <typename T>
struct OneVector {
  using Element = T;
  static constexpr int kStep = 16, kParts = 1, kMostX = 4;
  static constexpr int64_t slot(int64_t column) { return column; }
  static __m512 keep(uint32_t mask, int, __m512 x) { return _mm512_maskz_mov_ps((__mmask16)mask, x); }
};

struct OfFloat : OneVector<float> {
  static int expand(const float* values, uint32_t mask, __m512* parts) {
    parts[0] = _mm512_maskz_expand_ps((__mmask16)mask, _mm512_loadu_ps(values));
    return __builtin_popcount(mask);
  }
};

struct OfHalf : OneVector<Half> {
  static int expand(const Half* values, uint32_t mask, __m512* parts) {
    const __m256i next = _mm256_loadu_si256((const __m256i*)values);
    parts[0] = _mm512_cvtph_ps(_mm256_maskz_expand_epi16((__mmask16)mask, next));
    return __builtin_popcount(mask);
  }
};

// 32 columns: the even ones become one vector of fp32, the odd ones the other.
struct OfBFloat {
  using Element = BFloat;
  static constexpr int kStep = 32, kParts = 2, kMostX = 4;
  static constexpr int64_t slot(int64_t column) { return column % 2 * 16 + column / 2; }
  static int expand(const BFloat* values, uint32_t mask, __m512* parts) {
    const __m512i words = _mm512_maskz_expand_epi16((__mmask32)mask, _mm512_loadu_si512(values));
    parts[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    parts[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    return __builtin_popcount(mask);
  }
  static __m512 keep(uint32_t mask, int part, __m512 x) {
    const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i own = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(mask >> part)), lanes);
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(own, _mm512_set1_epi32(1)), x);
  }
};

struct Two {
  using Element = uint16_t;
  static int expand(const uint16_t* values, uint32_t mask, uint16_t* out) {
    const __m128i next = _mm_loadu_si128((const __m128i*)values);
    _mm_storeu_si128((__m128i*)out, _mm_maskz_expand_epi16((__mmask8)mask, next));
    return __builtin_popcount(mask);
  }
};

struct Four {
  using Element = uint32_t;
  static int expand(const uint32_t* values, uint32_t mask, uint32_t* out) {
    const __m256i next = _mm256_loadu_si256((const __m256i*)values);
    _mm256_storeu_si256((__m256i*)out, _mm256_maskz_expand_epi32((__mmask8)mask, next));
    return __builtin_popcount(mask);
  }
};

// Adds the lanes 8 apart, then 4, 2 and 1 apart.
inline float sum_of_pairs(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace WANDA_ISA

// Needs the structs above.
#include "packed_rows_isa.h"

namespace wanda::cpu {
extern const PackedKernels kPackedAvx512 =
    WANDA_ISA::Packed<WANDA_ISA::OfFloat, WANDA_ISA::OfHalf, WANDA_ISA::OfBFloat, WANDA_ISA::Two,
                      WANDA_ISA::Four>::kernels;
}
#else
namespace wanda::cpu {
extern const PackedKernels kPackedAvx512 = {};
}
#endif
#endif
