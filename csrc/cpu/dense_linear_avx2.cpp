// out = x weight^T + bias with AVX2 for a dense weight. Each lane holds one output.
//
// 24 rows of the weight and 64 tokens of x are transposed into panels of 8 and widened to fp32. A tile is 4 tokens by
// 24 outputs: its sums take 12 registers, and each column takes 3 loads and 4 broadcasts. A chunk of a group (576
// columns, 55 KiB) is read from L2 for all 64 tokens. The order of a sum depends on the number of columns alone. bf16
// products are exact in fp32; sums are rounded once, at the end.
#if defined(__x86_64__)
#define WANDA_ISA wanda_avx2_dense
#include "simd_avx2.h"

#include <algorithm>

#include "aligned_floats.h"
#include "linear.h"

namespace wanda::cpu {
namespace {

using WANDA_ISA::BFloat;
using WANDA_ISA::Simd;

constexpr int kWidth = Simd::kWidth, kVectors = 3, kTileTokens = 4;
constexpr int64_t kGroup = kVectors * kWidth;
constexpr int64_t kTokens = 64;
constexpr int64_t kChunk = 576;

// panel[n_cols, kWidth] = kWidth rows of the matrix from `row` on, transposed. Past the end, the last row is repeated.
template <typename T>
void pack(const Matrix& matrix, int64_t row, float* panel) {
  const T* rows[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    rows[i] = static_cast<const T*>(matrix.data) + std::min(row + i, matrix.n_rows - 1) * matrix.stride;
  }
  int64_t col = 0;
  for (; col + kWidth <= matrix.n_cols; col += kWidth) {
    __m256 v[kWidth];
    for (int i = 0; i < kWidth; ++i) v[i] = Simd::load(rows[i] + col);
    Simd::transpose(v);
    for (int i = 0; i < kWidth; ++i) _mm256_store_ps(panel + (col + i) * kWidth, v[i]);
  }
  for (; col < matrix.n_cols; ++col) {
    for (int i = 0; i < kWidth; ++i) panel[col * kWidth + i] = WANDA_ISA::to_float(rows[i][col]);
  }
}

size_t group_bytes(const Matrix& weight) { return rounded_up(weight.n_cols * kGroup * sizeof(float)); }

bool prepare(const Matrix& weight, int64_t row, void* group) {
  for (int64_t i = 0; i < kGroup; i += kWidth) {
    float* const panel = static_cast<float*>(group) + i * weight.n_cols;
    if (weight.dtype == DType::kFloat) pack<float>(weight, row + i, panel);
    else pack<BFloat>(weight, row + i, panel);
  }
  return true;
}

// sums[kTileTokens, kGroup] (+)= the sum over n_cols columns. x points at a token of its panel; the panels of `weight`
// are `panel` floats apart.
template <bool kAdd>
void multiply_tile(const float* x, const float* weight, int64_t panel, int64_t n_cols, float* sums) {
  __m256 sum[kTileTokens][kVectors];
// Unrolled early: GCC would otherwise keep a copy of the sums in memory.
#pragma GCC unroll 4
  for (int token = 0; token < kTileTokens; ++token) {
#pragma GCC unroll 3
    for (int i = 0; i < kVectors; ++i) {
      sum[token][i] = kAdd ? _mm256_load_ps(sums + token * kGroup + i * kWidth) : _mm256_setzero_ps();
    }
  }
  for (int64_t col = 0; col < n_cols; ++col, x += kWidth, weight += kWidth) {
    __m256 w[kVectors];
#pragma GCC unroll 3
    for (int i = 0; i < kVectors; ++i) w[i] = _mm256_load_ps(weight + i * panel);
#pragma GCC unroll 4
    for (int token = 0; token < kTileTokens; ++token) {
      const __m256 value = _mm256_broadcast_ss(x + token);
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i) sum[token][i] = _mm256_fmadd_ps(value, w[i], sum[token][i]);
    }
  }
#pragma GCC unroll 4
  for (int token = 0; token < kTileTokens; ++token) {
#pragma GCC unroll 3
    for (int i = 0; i < kVectors; ++i) _mm256_store_ps(sums + token * kGroup + i * kWidth, sum[token][i]);
  }
}

// sums[kTokens, kGroup] of one group of rows. x is in panels of n_cols columns.
void multiply_group(const float* x, const float* group, int64_t n_cols, int64_t n_tokens, float* sums) {
  for (int64_t col = 0; col < n_cols; col += kChunk) {
    const int64_t n = std::min(kChunk, n_cols - col);
    for (int64_t token = 0; token < n_tokens; token += kTileTokens) {
      const float* const panel = x + (token / kWidth * n_cols + col) * kWidth + token % kWidth;
      const auto multiply = col == 0 ? multiply_tile<false> : multiply_tile<true>;
      multiply(panel, group + col * kWidth, n_cols * kWidth, n, sums + token * kGroup);
    }
  }
}

// out[n_tokens, n_rows] = sums + bias; bias is [n_rows] or null.
template <typename T>
void store_sums(const float* sums, const T* bias, int64_t n_rows, int64_t n_tokens, T* out, int64_t stride) {
  T padded[kGroup] = {};
  if (bias) std::copy_n(bias, n_rows, padded);
  __m256 added[kVectors];
  for (int i = 0; i < kVectors; ++i) added[i] = Simd::load(padded + i * kWidth);
  for (int64_t token = 0; token < n_tokens; ++token) {
    T* const target = out + token * stride;
    T* const whole = n_rows == kGroup ? target : padded;
    for (int i = 0; i < kVectors; ++i) {
      const __m256 sum = _mm256_load_ps(sums + token * kGroup + i * kWidth);
      Simd::store(whole + i * kWidth, bias ? Simd::add(sum, added[i]) : sum);
    }
    if (whole == padded) std::copy_n(padded, n_rows, target);
  }
}

template <typename T>
void multiply(const Linear& s, char* groups, int64_t first_row, int64_t end_row, int64_t begin, int64_t end) {
  const Floats panels = floats(kTokens * s.x.n_cols), sums = floats(kTokens * kGroup);
  const T* const bias = static_cast<const T*>(s.bias);
  for (int64_t token = begin; token < end; token += kTokens) {
    const int64_t n_tokens = std::min(kTokens, end - token);
    for (int64_t i = 0; i < n_tokens; i += kWidth) pack<T>(s.x, token + i, panels.get() + i * s.x.n_cols);
    char* group = groups;
    for (int64_t row = first_row; row < end_row; row += kGroup, group += group_bytes(s.weight)) {
      multiply_group(panels.get(), reinterpret_cast<float*>(group), s.x.n_cols, n_tokens, sums.get());
      store_sums(sums.get(), bias ? bias + row : nullptr, std::min(kGroup, end_row - row), n_tokens,
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

extern const LinearKernels kDenseAvx2 = {
    .rows = kGroup,
    .tokens = kTokens,
    .cache_bytes = 1 << 23,  // 8 MiB, which a shared L3 holds
    .group_bytes = group_bytes,
    .prepare = prepare,
    .multiply = multiply,
};

}  // namespace wanda::cpu
#endif
