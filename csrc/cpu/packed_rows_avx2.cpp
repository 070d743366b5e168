// Packed rows with AVX2. A table of 256 shuffles, one for each byte of bits, moves the next values to their lanes.
#if defined(__x86_64__)
#define WANDA_ISA wanda_packed_avx2
#include "simd_avx2.h"

#include <array>

namespace WANDA_ISA {

// element_at(place, count) of each of 8 places for each byte: `count` values precede the one in this place; -1: none.
template <typename T, int kPerLane, typename Entry>
constexpr auto table_of(Entry entry) {
  std::array<std::array<T, 8 * kPerLane>, 256> table = {};
  for (int byte = 0; byte < 256; ++byte) {
    for (int lane = 0, count = 0; lane < 8; ++lane) {
      const bool has_value = byte >> lane & 1;
      for (int i = 0; i < kPerLane; ++i) table[byte][lane * kPerLane + i] = entry(has_value ? count : -1, i);
      count += has_value;
    }
  }
  return table;
}

constexpr uint8_t kZero = 0x80;  // a shuffle writes zero here

// Bytes of 8 values of 16 bits to 8 places of 16 bits.
alignas(64) constexpr auto kWords = table_of<uint8_t, 2>([](int value, int byte) -> uint8_t {
  return value < 0 ? kZero : 2 * value + byte;
});
// Bytes of 8 values of 16 bits to the upper halves of 8 places of 32 bits.
alignas(64) constexpr auto kHighWords = table_of<uint8_t, 4>([](int value, int byte) -> uint8_t {
  return value < 0 || byte < 2 ? kZero : 2 * value + byte - 2;
});
// 8 values of 32 bits to 8 places. A negative index: no value.
alignas(64) constexpr auto kLanes = table_of<int32_t, 1>([](int value, int) { return value; });

inline __m256 kept_lanes(uint32_t mask, __m256 v) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i own = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), lanes);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(own, lanes)));
}

// Where an entry of 32 bytes begins: the byte's shuffle, and its number of bits in one register less.
inline uint64_t place_of(uint32_t mask) {
  uint64_t place = uint64_t{mask} << 5;
  // Without this, GCC counts the bits of `mask` and copies it first.
  asm("" : "+r"(place));
  return place;
}

template <typename Vector, typename Table>
const Vector* entry_at(const Table& table, uint64_t place) {
  return reinterpret_cast<const Vector*>(reinterpret_cast<const char*>(table.data()) + place);
}

inline __m128i expand_words(const void* values, uint32_t mask) {
  return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), *(const __m128i*)kWords[mask].data());
}

inline __m256 expand_lanes(const void* values, uint64_t place) {
  const __m256i lanes = *entry_at<__m256i>(kLanes, place);
  const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)values), lanes);
  __m256 zero = _mm256_setzero_ps();
  // Without this, GCC replaces the blend by a comparison and a logical operation.
  asm("" : "+x"(zero));
  return _mm256_blendv_ps(moved, zero, _mm256_castsi256_ps(lanes));
}

template <typename T>
struct OneVector {
  using Element = T;
  static constexpr int kStep = 8, kParts = 1, kMostX = 4;
  static constexpr int64_t slot(int64_t column) { return column; }
  static __m256 keep(uint32_t mask, int, __m256 x) { return kept_lanes(mask, x); }
};

struct OfFloat : OneVector<float> {
  static int expand(const float* values, uint32_t mask, __m256* parts) {
    const uint64_t place = place_of(mask);
    parts[0] = expand_lanes(values, place);
    return __builtin_popcountll(place);
  }
};

struct OfHalf : OneVector<Half> {
  static int expand(const Half* values, uint32_t mask, __m256* parts) {
    parts[0] = _mm256_cvtph_ps(expand_words(values, mask));
    return __builtin_popcount(mask);
  }
};

struct OfBFloat : OneVector<BFloat> {
  static int expand(const BFloat* values, uint32_t mask, __m256* parts) {
    const uint64_t place = place_of(mask);
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
    parts[0] = _mm256_castsi256_ps(_mm256_shuffle_epi8(both, *entry_at<__m256i>(kHighWords, place)));
    return __builtin_popcountll(place);
  }
};

struct Two {
  using Element = uint16_t;
  static int expand(const uint16_t* values, uint32_t mask, uint16_t* out) {
    _mm_storeu_si128((__m128i*)out, expand_words(values, mask));
    return __builtin_popcount(mask);
  }
};

struct Four {
  using Element = uint32_t;
  static int expand(const uint32_t* values, uint32_t mask, uint32_t* out) {
    _mm256_storeu_ps((float*)out, expand_lanes(values, place_of(mask)));
    return __builtin_popcount(mask);
  }
};

// Adds the lanes 4 apart, then 2 apart, then 1 apart.
inline float sum_of_pairs(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace WANDA_ISA

// Needs the structs above.
#include "packed_rows_isa.h"

namespace wanda::cpu {
extern const PackedKernels kPackedAvx2 =
    WANDA_ISA::Packed<WANDA_ISA::OfFloat, WANDA_ISA::OfHalf, WANDA_ISA::OfBFloat, WANDA_ISA::Two,
                      WANDA_ISA::Four>::kernels;
}
#endif
