// The pieces of a matrix product over tokens with bf16 operands. Operands lie in panels of 16 columns: for every two
// tokens 16 words, a column's two values in each, zeros past the last token and column.
#pragma once

#include "../kernels.h"

namespace wanda::cpu {

constexpr int64_t kPanel = 16;

constexpr int64_t panels_of(int64_t n_cols) { return (n_cols + kPanel - 1) / kPanel; }

bool has_bf16();

// Columns [16 * panel, 16 * panel + 16) of x, fp32 [n_tokens, n_cols], as ceil(n_tokens / 2) * 16 words.
void pack_panel(const Matrix& x, int64_t panel, uint32_t* pairs);

// acc[n_rows, n_cols] += a^T b; a is one panel, of which n_rows columns count; b is panels_of(n_cols) of them.
void add_panel_product(const uint32_t* a, const uint32_t* b, int64_t n_pairs, float* acc, int64_t stride,
                       int64_t n_rows, int64_t n_cols);

}  // namespace wanda::cpu
