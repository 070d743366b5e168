// out = x weight^T + bias with AVX-512 for a pruned weight. Only non-zero weights are multiplied.
//
// A row of the weight is split into chunks of 64 bytes. At most half of a chunk's elements may be non-zero: this holds
// for any N:M with N <= M / 2 if M divides the chunk. The non-zero elements are packed into 8 units of 32 bits (one
// fp32, or two bf16 that VDPBF16PS multiplies and adds), with the position of each element in the chunk. 16 rows are
// interleaved: lane i of a step belongs to row i. Each step permutes a token's chunk so that every lane holds the
// elements that its row needs. That takes one permutation and one multiply-add, where the dense product takes two
// multiply-adds.
#if defined(__x86_64__)
#include "linear.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#define WANDA_ISA wanda_avx512_sparse
#include "simd_avx512.h"

#include <algorithm>
#include <cstdint>

namespace wanda::cpu {
namespace {

using WANDA_ISA::Simd;

constexpr int64_t kSparseRows = 16;   // rows of a weight that are compressed together
constexpr int64_t kSparseTokens = 8;  // tokens of x that are multiplied with them at once
constexpr int kSteps = 8;             // steps of a chunk
// Bytes of x that are multiplied with all rows before the next tile: a quarter of L2.
constexpr int64_t kTileBytes = 1 << 17;

struct Step {
  __m512i values, positions;
};

struct Fp32 {
  using Element = float;
  static constexpr int kChunk = 16;
  static __m512i load(int64_t n, const float* p) { return _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p); }
  // Packs the non-zero elements, and their positions, into the low half of a vector. Returns their number.
  static int compress(__m512i chunk, __m256i& values, __m256i& positions) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 kept = _mm512_test_epi32_mask(chunk, _mm512_set1_epi32(0x7fffffff));
    values = _mm512_castsi512_si256(_mm512_maskz_compress_epi32(kept, chunk));
    positions = _mm512_castsi512_si256(_mm512_maskz_compress_epi32(kept, lanes));
    return _mm_popcnt_u32(kept);
  }
  static __m512 multiply_add(__m512 sum, const Step& step, __m512i chunk) {
    const __m512 own = _mm512_castsi512_ps(_mm512_permutexvar_epi32(step.positions, chunk));
    return _mm512_fmadd_ps(_mm512_castsi512_ps(step.values), own, sum);
  }
  static __m512 widen(const float* p, __mmask16 inside) { return _mm512_maskz_loadu_ps(inside, p); }
  static void store(float* p, __mmask16 inside, __m512 v) { _mm512_mask_storeu_ps(p, inside, v); }
};

struct Bf16 {
  using Element = uint16_t;
  static constexpr int kChunk = 32;
  static __m512i load(int64_t n, const uint16_t* p) {
    return _mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << n) - 1), p);
  }
  static int compress(__m512i chunk, __m256i& values, __m256i& positions) {
    alignas(64) static constexpr uint16_t kLanes[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                        16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const __mmask32 kept = _mm512_test_epi16_mask(chunk, _mm512_set1_epi16(0x7fff));
    values = _mm512_castsi512_si256(_mm512_maskz_compress_epi16(kept, chunk));
    positions = _mm512_castsi512_si256(_mm512_maskz_compress_epi16(kept, _mm512_load_si512(kLanes)));
    return _mm_popcnt_u32(kept);
  }
  static __m512 multiply_add(__m512 sum, const Step& step, __m512i chunk) {
    return _mm512_dpbf16_ps(sum, (__m512bh)step.values, (__m512bh)_mm512_permutexvar_epi16(step.positions, chunk));
  }
  static __m512 widen(const uint16_t* p, __mmask16 inside) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store(uint16_t* p, __mmask16 inside, __m512 v) {
    _mm256_mask_storeu_epi16(p, inside, (__m256i)_mm512_cvtneps_pbh(v));
  }
};

int64_t chunks_of(int64_t n_cols, int64_t chunk) { return (n_cols + chunk - 1) / chunk; }

template <typename T>
bool compress(const Matrix& weight, int64_t row, Step* steps) {
  const auto* first = static_cast<const typename T::Element*>(weight.data) + row * weight.stride;
  const int64_t n_rows = std::min(kSparseRows, weight.n_rows - row);
  for (int64_t col = 0; col < weight.n_cols; col += T::kChunk, steps += kSteps) {
    const int64_t n_cols = std::min<int64_t>(T::kChunk, weight.n_cols - col);
    __m512 rows[kSparseRows];  // low half: the values of a row; high half: their positions
    int most = 0;
    for (int64_t i = 0; i < kSparseRows; ++i) {
      __m256i values = _mm256_setzero_si256(), positions = values;
      if (i < n_rows) {
        most = std::max(most, T::compress(T::load(n_cols, first + i * weight.stride + col), values, positions));
      }
      rows[i] = _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(values), positions, 1));
    }
    if (most > T::kChunk / 2) return false;
    Simd::transpose(rows);
    for (int i = 0; i < kSteps; ++i) steps[i] = {Simd::bits(rows[i]), Simd::bits(rows[kSteps + i])};
  }
  return true;
}

template <typename T>
void multiply_tile(const Linear& s, const Step* steps, int64_t row, int64_t token, int64_t end) {
  using Element = typename T::Element;
  const __mmask16 inside = (__mmask16)((1u << std::min(kSparseRows, s.weight.n_rows - row)) - 1);
  const __m512 bias = s.bias ? T::widen(static_cast<const Element*>(s.bias) + row, inside) : _mm512_setzero_ps();
  const Element* x[kSparseTokens];
  __m512 sums[kSparseTokens];
  // Past the end, the last token is repeated.
  for (int i = 0; i < kSparseTokens; ++i) {
    x[i] = static_cast<const Element*>(s.x.data) + std::min(token + i, end - 1) * s.x.stride;
    sums[i] = bias;
  }
  const auto add = [&](auto load) {
    __m512i chunks[kSparseTokens];
    for (int i = 0; i < kSparseTokens; ++i) chunks[i] = load(x[i]);
#pragma GCC unroll 1
    for (int step = 0; step < kSteps; ++step, ++steps) {
      for (int i = 0; i < kSparseTokens; ++i) sums[i] = T::multiply_add(sums[i], *steps, chunks[i]);
    }
  };
  int64_t col = 0;
  for (; col + T::kChunk <= s.x.n_cols; col += T::kChunk) {
    add([=](const Element* p) { return _mm512_loadu_si512(p + col); });
  }
  if (col < s.x.n_cols) add([&](const Element* p) { return T::load(s.x.n_cols - col, p + col); });
  for (int i = 0; i < kSparseTokens; ++i) {
    const int64_t at = std::min(token + i, end - 1);
    T::store(static_cast<Element*>(s.out.data) + at * s.out.stride + row, inside, sums[i]);
  }
}

template <typename T>
void multiply(const Linear& s, const Step* steps, int64_t first_row, int64_t end_row, int64_t begin,
              int64_t end) {
  const int64_t n_steps = chunks_of(s.x.n_cols, T::kChunk) * kSteps;
  const int64_t token_bytes = s.x.n_cols * static_cast<int64_t>(sizeof(typename T::Element));
  const int64_t tile = std::max<int64_t>(1, kTileBytes / token_bytes / kSparseTokens) * kSparseTokens;
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t last = std::min(end, first + tile);
    for (int64_t row = first_row; row < end_row; row += kSparseRows) {
      const Step* own = steps + (row - first_row) / kSparseRows * n_steps;
      for (int64_t token = first; token < last; token += kSparseTokens) multiply_tile<T>(s, own, row, token, last);
    }
  }
}

size_t compressed_bytes(const Matrix& weight) {
  const int64_t chunk = weight.dtype == DType::kFloat ? Fp32::kChunk : Bf16::kChunk;
  return chunks_of(weight.n_cols, chunk) * kSteps * sizeof(Step);
}

bool compress_rows(const Matrix& weight, int64_t row, void* compressed) {
  Step* steps = static_cast<Step*>(compressed);
  return weight.dtype == DType::kFloat ? compress<Fp32>(weight, row, steps) : compress<Bf16>(weight, row, steps);
}

void multiply_sparse(const Linear& s, void* compressed, int64_t first_row, int64_t end_row, int64_t begin,
                     int64_t end) {
  const Step* steps = static_cast<const Step*>(compressed);
  if (s.weight.dtype == DType::kFloat) multiply<Fp32>(s, steps, first_row, end_row, begin, end);
  else multiply<Bf16>(s, steps, first_row, end_row, begin, end);
}

}  // namespace

extern const LinearKernels kSparseAvx512 = {
    .rows = kSparseRows,
    .tokens = kSparseTokens,
    .cache_bytes = 1 << 22,  // 4 MiB, which a shared L3 holds
    .group_bytes = compressed_bytes,
    .prepare = compress_rows,
    .multiply = multiply_sparse,
};

}  // namespace wanda::cpu
#else
namespace wanda::cpu {

extern const LinearKernels kSparseAvx512 = {};

}  // namespace wanda::cpu
#endif
#endif
