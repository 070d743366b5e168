// 16 lanes of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "types.h"

namespace WANDA_ISA {

struct Simd {
  static constexpr int kWidth = 16;
  using Float = __m512;
  using Int = __m512i;
  using Mask = __mmask16;

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static Float load(const BFloat* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  // The upper 16 bits of each lane.
  static void store_high_words(uint16_t* p, Float v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(v), 16)));
  }
  // Masked lanes are neither read nor written.
  static Float load_where(Mask mask, const float* p) { return _mm512_maskz_loadu_ps(mask, p); }
  static void store_where(Mask mask, float* p, Float v) { _mm512_mask_storeu_ps(p, mask, v); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float add_square(Float sum, Float x) { return _mm512_fmadd_ps(x, x, sum); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Float subtract_product(Float from, Float a, Float b) { return _mm512_fnmadd_ps(a, b, from); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float nearest_integer(Float a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  // a * 2^n, for integral n.
  static Float times_two_to(Float n, Float a) { return _mm512_scalef_ps(a, n); }
  static Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float sqrt(Float a) { return _mm512_sqrt_ps(a); }
  static Int bits(Float a) { return _mm512_castps_si512(a); }
  static Float as_float(Int a) { return _mm512_castsi512_ps(a); }
  static Float broadcast(float v) { return _mm512_set1_ps(v); }

  static Int broadcast(int32_t v) { return _mm512_set1_epi32(v); }
  static Int load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
  static Int load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static void store_bytes(uint8_t* p, Int v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
  static Int bit_and(Int a, Int b) { return _mm512_and_si512(a, b); }
  static Int min(Int a, Int b) { return _mm512_min_epi32(a, b); }
  static Int max(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  template <int R>  // lane i holds what lane i ^ R held
  static Int exchange(Int v) {
    if constexpr ((R & 8) != 0) v = _mm512_shuffle_i32x4(v, v, 0x4e);
    if constexpr ((R & 4) != 0) v = _mm512_shuffle_i32x4(v, v, 0xb1);
    if constexpr ((R & 3) == 1) return _mm512_shuffle_epi32(v, _MM_PERM_CDAB);
    if constexpr ((R & 3) == 2) return _mm512_shuffle_epi32(v, _MM_PERM_BADC);
    if constexpr ((R & 3) == 3) return _mm512_shuffle_epi32(v, _MM_PERM_ABCD);
    return v;
  }
  static Int gather(const int32_t* p, Int index) { return _mm512_i32gather_epi32(index, p, 4); }
  static int64_t sum(Int v) { return _mm512_reduce_add_epi32(v); }
  static int32_t lowest(Int v) { return _mm512_reduce_min_epi32(v); }
  static int32_t highest(Int v) { return _mm512_reduce_max_epi32(v); }

  static float sum(Float v) { return _mm512_reduce_add_ps(v); }
  static float highest(Float v) { return _mm512_reduce_max_ps(v); }
  static float lowest(Float v) { return _mm512_reduce_min_ps(v); }
  static float first_lane(Float v) { return _mm512_cvtss_f32(v); }

  // The lanes whose bits are set.
  static Mask lanes(uint32_t bits) { return (__mmask16)bits; }
  // The lowest n lanes.
  static Mask first(int64_t n) { return (__mmask16)((1u << n) - 1); }
  static Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask less(Int a, Int b) { return _mm512_cmplt_epi32_mask(a, b); }
  static Mask equal(Int a, Int b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static Mask either(Mask a, Mask b) { return a | b; }
  static Int add_where(Mask mask, Int a, Int b) { return _mm512_mask_add_epi32(a, mask, a, b); }
  static Int increment_where(Mask mask, Int a) { return add_where(mask, a, broadcast(1)); }
  static uint32_t to_bits(Mask mask) { return mask; }
  static Float select(Mask mask, Float a, Float b) { return _mm512_mask_blend_ps(mask, b, a); }
  static Int select(Mask mask, Int a, Int b) { return _mm512_mask_blend_epi32(mask, b, a); }
  static Float zero_unless(Mask mask, Float a) { return _mm512_maskz_mov_ps(mask, a); }
  static Float zero_if(Mask mask, Float a) { return _mm512_maskz_mov_ps(_knot_mask16(mask), a); }

  // Lane i of v[j] becomes lane j of v[i].
  static void transpose(Float* v) {
    Float pairs[kWidth], fours[kWidth];
    for (int i = 0; i < kWidth; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    // fours[4 i + j]: columns j, j + 4, j + 8 and j + 12 of rows 4 i to 4 i + 3, each in one quarter.
    for (int i = 0; i < kWidth; i += 4) {
      fours[i] = unpack_low(pairs[i], pairs[i + 2]);
      fours[i + 1] = unpack_high(pairs[i], pairs[i + 2]);
      fours[i + 2] = unpack_low(pairs[i + 1], pairs[i + 3]);
      fours[i + 3] = unpack_high(pairs[i + 1], pairs[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      const Float a = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0x88);
      const Float b = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0xdd);
      const Float c = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0x88);
      const Float d = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0xdd);
      v[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      v[j + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      v[j + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      v[j + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

  // p[lane] = 0 if the lane's bit is set; a Mask is such bits. Other lanes keep their bits.
  static void zero_where(uint32_t bits, float* p) { _mm512_mask_storeu_ps(p, (__mmask16)bits, _mm512_setzero_ps()); }
  template <typename T>  // Half, BFloat
  static void zero_where(uint32_t bits, T* p) {
    _mm256_storeu_si256((__m256i*)p, _mm256_maskz_loadu_epi16((__mmask16)~bits, p));
  }

 private:
  static Float unpack_low(Float a, Float b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Float unpack_high(Float a, Float b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
};

}  // namespace WANDA_ISA
