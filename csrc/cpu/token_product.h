// The pieces of acc += a^T b over tokens, with fp32 sums; see token_product_avx512.cpp. Operands lie in panels of 16
// columns, a word of 32 bits for each column and unit of tokens: one token's fp32, or two tokens' bf16.
#pragma once

#include "../kernels.h"

namespace wanda::cpu {

#if defined(__x86_64__)
constexpr int64_t kPanel = 16;
extern const bool kTokenProductCompiled;  // false where the compiler knows no AVX-512-BF16

constexpr int64_t panels_of(int64_t n_cols) { return (n_cols + kPanel - 1) / kPanel; }
constexpr int64_t units_of(int64_t n_tokens, bool in_bf16) { return in_bf16 ? (n_tokens + 1) / 2 : n_tokens; }

// Columns [16 * panel, 16 * panel + 16) of x, fp32 [n_tokens, n_cols], as units_of(n_tokens) * 16 words, zeros past
// the last token and column.
void pack_panel(const Matrix& x, int64_t panel, bool in_bf16, uint32_t* words);

// acc[n_rows, n_cols] += a^T b; a is one panel, of which n_rows columns count; b is panels_of(n_cols) of them.
void add_panel_product(const uint32_t* a, const uint32_t* b, int64_t n_units, bool in_bf16, float* acc,
                       int64_t stride, int64_t n_rows, int64_t n_cols);
#endif

}  // namespace wanda::cpu
