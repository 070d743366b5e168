// 8 lanes of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace WANDA_ISA {

struct Simd {
  static constexpr int kWidth = 8;
  using Float = __m256;
  using Int = __m256i;
  using Mask = __m256i;  // all bits of a lane set, or none

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static Float load(const BFloat* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  // Rounded to nearest, ties to even. A NaN stays a NaN.
  static void store(BFloat* p, Float v) {
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits(v), 16), broadcast(1));
    const Int nearest = add(bits(v), add(odd, broadcast(0x7fff)));
    const Int quiet = _mm256_or_si256(bits(v), broadcast(0x400000));
    const Float kept = select(bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)), as_float(quiet), as_float(nearest));
    store_high_words(reinterpret_cast<uint16_t*>(p), kept);
  }
  // The upper 16 bits of each lane.
  static void store_high_words(uint16_t* p, Float v) {
    const Int words = _mm256_srli_epi32(bits(v), 16);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
  }
  // Masked lanes are neither read nor written.
  static Float load_where(Mask mask, const float* p) { return _mm256_maskload_ps(p, mask); }
  static void store_where(Mask mask, float* p, Float v) { _mm256_maskstore_ps(p, mask, v); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float add_square(Float sum, Float x) { return _mm256_fmadd_ps(x, x, sum); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Float subtract_product(Float from, Float a, Float b) { return _mm256_fnmadd_ps(a, b, from); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float nearest_integer(Float a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // a * 2^n, for integral n such that 2^n is a normal number.
  static Float times_two_to(Float n, Float a) {
    return multiply(a, as_float(_mm256_slli_epi32(add(_mm256_cvtps_epi32(n), broadcast(127)), 23)));
  }
  static Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float sqrt(Float a) { return _mm256_sqrt_ps(a); }
  static Int bits(Float a) { return _mm256_castps_si256(a); }
  static Float as_float(Int a) { return _mm256_castsi256_ps(a); }
  static Float broadcast(float v) { return _mm256_set1_ps(v); }

  static Int broadcast(int32_t v) { return _mm256_set1_epi32(v); }
  static Int load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static void store(int32_t* p, Int v) { _mm256_storeu_si256((__m256i*)p, v); }
  static Int load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
  static void store_bytes(uint8_t* p, Int v) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
  }
  static Int bit_and(Int a, Int b) { return _mm256_and_si256(a, b); }
  static Int min(Int a, Int b) { return _mm256_min_epi32(a, b); }
  static Int max(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  template <int R>  // lane i holds what lane i ^ R held
  static Int exchange(Int v) {
    if constexpr ((R & 4) != 0) v = _mm256_permute2x128_si256(v, v, 1);
    if constexpr ((R & 3) != 0) v = _mm256_shuffle_epi32(v, (R & 3) == 1 ? 0xb1 : (R & 3) == 2 ? 0x4e : 0x1b);
    return v;
  }
  static Int gather(const int32_t* p, Int index) { return _mm256_i32gather_epi32(p, index, 4); }
  static int64_t sum(Int v) {
    int32_t lane[kWidth];
    store(lane, v);
    int64_t total = 0;
    for (int32_t each : lane) total += each;
    return total;
  }
  static int32_t lowest(Int v) {
    int32_t lane[kWidth];
    store(lane, v);
    int32_t result = lane[0];
    for (int32_t each : lane) result = smaller(result, each);
    return result;
  }
  static int32_t highest(Int v) {
    int32_t lane[kWidth];
    store(lane, v);
    int32_t result = lane[0];
    for (int32_t each : lane) result = larger(result, each);
    return result;
  }

  static float sum(Float v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float highest(Float v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static float lowest(Float v) {
    const __m128 four = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
  }
  static float first_lane(Float v) { return _mm256_cvtss_f32(v); }

  // The lanes whose bits are set.
  static Mask lanes(uint32_t bits) {
    const Int place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return equal(bit_and(broadcast((int32_t)bits), place), place);
  }
  // The lowest n lanes.
  static Mask first(int64_t n) {
    return _mm256_cmpgt_epi32(broadcast((int32_t)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Mask less(Float a, Float b) { return bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static Mask less(Int a, Int b) { return _mm256_cmpgt_epi32(b, a); }
  static Mask equal(Int a, Int b) { return _mm256_cmpeq_epi32(a, b); }
  static Mask both(Mask a, Mask b) { return _mm256_and_si256(a, b); }
  static Mask either(Mask a, Mask b) { return _mm256_or_si256(a, b); }
  static Int add_where(Mask mask, Int a, Int b) { return _mm256_add_epi32(a, _mm256_and_si256(mask, b)); }
  static Int increment_where(Mask mask, Int a) { return _mm256_sub_epi32(a, mask); }
  static uint32_t to_bits(Mask mask) { return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(mask)); }
  static Float select(Mask mask, Float a, Float b) { return _mm256_blendv_ps(b, a, as_float(mask)); }
  static Int select(Mask mask, Int a, Int b) { return _mm256_blendv_epi8(b, a, mask); }
  static Float zero_unless(Mask mask, Float a) { return _mm256_and_ps(as_float(mask), a); }
  static Float zero_if(Mask mask, Float a) { return _mm256_andnot_ps(as_float(mask), a); }

  // Lane i of v[j] becomes lane j of v[i].
  static void transpose(Float* v) {
    Float pairs[kWidth], fours[kWidth];
    for (int i = 0; i < kWidth; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    // fours[4 i + j]: columns j and j + 4 of rows 4 i to 4 i + 3, each in one half.
    for (int i = 0; i < kWidth; i += 4) {
      fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      v[j] = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x20);
      v[j + 4] = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x31);
    }
  }

  // p[lane] = 0 if the lane is set in the mask or in `bits`. Other lanes keep their bits.
  static void zero_where(Mask mask, float* p) {
    _mm256_storeu_ps(p, _mm256_andnot_ps(_mm256_castsi256_ps(mask), _mm256_loadu_ps(p)));
  }
  template <typename T>  // Half, BFloat
  static void zero_where(Mask mask, T* p) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(mask), _mm256_extracti128_si256(mask, 1));
    _mm_storeu_si128((__m128i*)p, _mm_andnot_si128(words, _mm_loadu_si128((const __m128i*)p)));
  }
  static void zero_where(uint32_t bits, float* p) {
    zero_where(lanes(bits), p);
  }
  template <typename T>  // Half, BFloat
  static void zero_where(uint32_t bits, T* p) {
    const __m128i place = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
    const __m128i pruned = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16((short)bits), place), place);
    _mm_storeu_si128((__m128i*)p, _mm_andnot_si128(pruned, _mm_loadu_si128((const __m128i*)p)));
  }
};

}  // namespace WANDA_ISA
