// out = x weight^T + bias with AVX2 for a pruned weight. Each lane holds one token.
//
// A tile of 96 tokens is transposed and widened to fp32. A chunk of 48 columns of it (18 KiB) stays in L1 while it is
// multiplied with all rows of a group. Of a row, each chunk keeps a list of the non-zero values and their columns. A
// value is broadcast and multiplied with 96 tokens into 12 registers: one load per multiply-add, and the cores do two
// of each per cycle. Zeros cost nothing wherever they are, so every pattern profits. bf16 products are exact in fp32;
// sums are rounded once, at the end.
#if defined(__x86_64__)
#define WANDA_ISA wanda_avx2_linear
#include "simd_avx2.h"

#include <algorithm>

#include "aligned_floats.h"
#include "linear.h"

namespace wanda::cpu {
namespace {

using WANDA_ISA::BFloat;
using WANDA_ISA::Simd;

constexpr int kWidth = Simd::kWidth;
constexpr int64_t kVectors = 12, kTokens = kVectors * kWidth;
constexpr int64_t kChunk = 48;
constexpr int64_t kRows = 96;       // rows of a group; its sums are 36 KiB
constexpr double kMostKept = 0.75;  // share of a group's weights; above it a dense product is faster

constexpr int64_t chunks_of(int64_t n_cols) { return (n_cols + kChunk - 1) / kChunk; }

// tile[n_cols, kTokens] = kTokens rows of x from `token` on, transposed. Past the end, the last token is repeated.
template <typename T>
void transpose_tokens(const Matrix& x, int64_t token, int64_t end, float* tile) {
  for (int64_t first = 0; first < kTokens; first += kWidth) {
    const T* rows[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      rows[i] = static_cast<const T*>(x.data) + std::min(token + first + i, end - 1) * x.stride;
    }
    int64_t col = 0;
    for (; col + kWidth <= x.n_cols; col += kWidth) {
      __m256 v[kWidth];
      for (int i = 0; i < kWidth; ++i) v[i] = Simd::load(rows[i] + col);
      Simd::transpose(v);
      for (int i = 0; i < kWidth; ++i) _mm256_store_ps(tile + (col + i) * kTokens + first, v[i]);
    }
    for (; col < x.n_cols; ++col) {
      for (int i = 0; i < kWidth; ++i) tile[col * kTokens + first + i] = WANDA_ISA::to_float(rows[i][col]);
    }
  }
}

// sums[kRows, kTokens] = bias
template <typename T>
void begin_sums(const void* bias, int64_t row, int64_t n_rows, float* sums) {
  for (int64_t i = 0; i < kRows; ++i) {
    const float value = bias && i < n_rows ? WANDA_ISA::to_float(static_cast<const T*>(bias)[row + i]) : 0.0f;
    std::fill_n(sums + i * kTokens, kTokens, value);
  }
}

// out[n_tokens, n_rows] = sums, transposed 16 rows at a time: 16 fp32 are one cache line.
template <typename T>
void store_sums(const float* sums, int64_t n_rows, int64_t n_tokens, T* out, int64_t stride) {
  for (int64_t token = 0; token < n_tokens; token += kWidth) {
    const int64_t n = std::min<int64_t>(kWidth, n_tokens - token);
    for (int64_t row = 0; row < n_rows; row += 2 * kWidth) {
      __m256 v[2][kWidth];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kWidth; ++i) v[half][i] = Simd::load(sums + (row + half * kWidth + i) * kTokens + token);
        Simd::transpose(v[half]);
      }
      for (int64_t i = 0; i < n; ++i) {
        T* const target = out + (token + i) * stride + row;
        if (row + 2 * kWidth <= n_rows) {
          Simd::store(target, v[0][i]);
          Simd::store(target + kWidth, v[1][i]);
        } else {
          T rest[2 * kWidth];
          Simd::store(rest, v[0][i]);
          Simd::store(rest + kWidth, v[1][i]);
          std::copy_n(rest, n_rows - row, target);
        }
      }
    }
  }
}

struct Entry {
  float value;
  uint32_t offset;  // floats from the start of the chunk of x to the value's column
};

// A prepared group: the end of every list, [chunks, kRows], followed by the lists in the same order.
struct Lists {
  Lists(void* group, int64_t n_cols)
      : ends(static_cast<uint32_t*>(group)), entries(reinterpret_cast<Entry*>(ends + chunks_of(n_cols) * kRows)) {}
  const Entry* begin(int64_t list) const { return entries + (list == 0 ? 0 : ends[list - 1]); }
  const Entry* end(int64_t list) const { return entries + ends[list]; }
  uint32_t* const ends;
  Entry* const entries;
};

int64_t list_capacity(int64_t n_rows, int64_t n_cols) {
  return static_cast<int64_t>(static_cast<double>(n_rows * n_cols) * kMostKept);
}

size_t group_bytes(const Matrix& weight) {
  const size_t ends = chunks_of(weight.n_cols) * kRows * sizeof(uint32_t);
  // append() always stores a whole vector of entries.
  return rounded_up(ends + (list_capacity(kRows, weight.n_cols) + kWidth) * sizeof(Entry));
}

// lanes[mask]: the lanes whose bits are set in the mask, packed to the front.
struct Compressions {
  alignas(32) int32_t lanes[256][kWidth];
  constexpr Compressions() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int n = 0;
      for (int lane = 0; lane < kWidth; ++lane) {
        if (mask >> lane & 1) lanes[mask][n++] = lane;
      }
    }
  }
};
constexpr Compressions kCompressions;

// Appends the non-zero lanes of v. Lane 0 is column `col` of its chunk.
inline Entry* append(__m256 v, int64_t col, Entry* entry) {
  // -0.0 is zero, NaN is not.
  const uint32_t kept = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  const __m256i lanes = Simd::load(kCompressions.lanes[kept]);
  const __m256 values = _mm256_permutevar8x32_ps(v, lanes);
  const __m256i columns = _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(col)));
  const __m256 offsets = _mm256_castsi256_ps(_mm256_mullo_epi32(columns, _mm256_set1_epi32(kTokens)));
  const __m256 low = _mm256_unpacklo_ps(values, offsets), high = _mm256_unpackhi_ps(values, offsets);
  Simd::store(&entry->value, _mm256_permute2f128_ps(low, high, 0x20));
  Simd::store(&(entry + 4)->value, _mm256_permute2f128_ps(low, high, 0x31));
  return entry + _mm_popcnt_u32(kept);
}

template <typename T>
bool list_rows(const Matrix& weight, int64_t row, void* group) {
  const Lists lists(group, weight.n_cols);
  uint32_t* end = lists.ends;
  Entry* entry = lists.entries;
  const int64_t n_rows = std::min(kRows, weight.n_rows - row);
  const Entry* const full = entry + list_capacity(n_rows, weight.n_cols);
  for (int64_t col = 0; col < weight.n_cols; col += kChunk) {
    const int64_t n_cols = std::min(kChunk, weight.n_cols - col);
    for (int64_t i = 0; i < kRows; ++i) {
      const T* source = static_cast<const T*>(weight.data) + (row + i) * weight.stride + col;
      for (int64_t j = 0; i < n_rows && j < n_cols; j += kWidth) {
        if (entry > full) return false;
        if (j + kWidth <= n_cols) {
          entry = append(Simd::load(source + j), j, entry);
          continue;
        }
        T rest[kWidth] = {};
        std::copy_n(source + j, n_cols - j, rest);
        entry = append(Simd::load(rest), j, entry);
      }
      *end++ = static_cast<uint32_t>(entry - lists.entries);
    }
  }
  return entry <= full;
}

bool prepare(const Matrix& weight, int64_t row, void* group) {
  return weight.dtype == DType::kFloat ? list_rows<float>(weight, row, group) : list_rows<BFloat>(weight, row, group);
}

inline void add_list(const Entry* entry, const Entry* end, const float* chunk, float* sums) {
  __m256 sum[kVectors];
// Unrolled early: GCC would otherwise keep a copy of the sums in memory.
#pragma GCC unroll 12
  for (int i = 0; i < kVectors; ++i) sum[i] = _mm256_load_ps(sums + i * kWidth);
  for (; entry < end; ++entry) {
    const __m256 value = _mm256_broadcast_ss(&entry->value);
    const float* const x = chunk + entry->offset;
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) {
      sum[i] = _mm256_fmadd_ps(value, _mm256_load_ps(x + i * kWidth), sum[i]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kVectors; ++i) _mm256_store_ps(sums + i * kWidth, sum[i]);
}

template <typename T>
void multiply(const Linear& s, char* groups, int64_t first_row, int64_t end_row, int64_t begin, int64_t end) {
  const Floats tile = floats(s.x.n_cols * kTokens), sums = floats(kRows * kTokens);
  for (int64_t token = begin; token < end; token += kTokens) {
    transpose_tokens<T>(s.x, token, end, tile.get());
    char* group = groups;
    for (int64_t row = first_row; row < end_row; row += kRows, group += group_bytes(s.weight)) {
      const int64_t n_rows = std::min(kRows, end_row - row);
      begin_sums<T>(s.bias, row, n_rows, sums.get());
      const Lists lists(group, s.x.n_cols);
      for (int64_t chunk = 0; chunk < chunks_of(s.x.n_cols); ++chunk) {
        for (int64_t i = 0; i < n_rows; ++i) {
          const int64_t list = chunk * kRows + i;
          add_list(lists.begin(list), lists.end(list), tile.get() + chunk * kChunk * kTokens, sums.get() + i * kTokens);
        }
      }
      store_sums(sums.get(), n_rows, std::min(kTokens, end - token),
                 static_cast<T*>(s.out.data) + token * s.out.stride + row, s.out.stride);
    }
  }
}

void multiply(const Linear& s, void* groups, int64_t first_row, int64_t end_row, int64_t begin, int64_t end) {
  char* const bytes = static_cast<char*>(groups);
  if (s.weight.dtype == DType::kFloat) multiply<float>(s, bytes, first_row, end_row, begin, end);
  else multiply<BFloat>(s, bytes, first_row, end_row, begin, end);
}

}  // namespace

extern const LinearKernels kSparseAvx2 = {
    .rows = kRows,
    .tokens = kTokens,
    .cache_bytes = 1 << 24,  // 16 MiB: groups are read in order, once per tile, so they need not be in a near cache
    .group_bytes = group_bytes,
    .prepare = prepare,
    .multiply = multiply,
};

}  // namespace wanda::cpu
#endif
