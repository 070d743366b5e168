// The pieces of acc += a^T b over tokens, with fp32 sums, by instruction set and operands; see token_product_isa.h.
// Operands lie in panels of as many columns as a vector has lanes, a word of 32 bits for each column and unit of
// tokens: one token's fp32, or two tokens' bf16.
#pragma once

#include "../kernels.h"

namespace wanda::cpu {

struct TokenProduct {
  int64_t panel;           // columns
  int64_t tokens;          // of a unit
  int64_t panels_at_once;  // of a, at most, that add_panels is best given
  // Columns [panel * i, panel * i + panel) of x, fp32 [n_tokens, n_cols], as units_of(n_tokens) * panel words, zeros
  // past the last token and column.
  void (*pack_panel)(const Matrix& x, int64_t i, uint32_t* words);
  // acc[n_rows, n_cols] += a^T b; a and b are panels_of(n_rows) and panels_of(n_cols) panels. With `upper`, what lies
  // below the diagonal may be left out. A sum's order depends on n_units alone.
  void (*add_panels)(const uint32_t* a, const uint32_t* b, int64_t n_units, float* acc, int64_t stride,
                     int64_t n_rows, int64_t n_cols, bool upper);

  int64_t panels_of(int64_t n_cols) const { return (n_cols + panel - 1) / panel; }
  int64_t units_of(int64_t n_tokens) const { return (n_tokens + tokens - 1) / tokens; }
};

#if defined(__x86_64__)
extern const TokenProduct kProductAvx512, kBrainProductAvx512;  // empty where the compiler knows no AVX-512-BF16
extern const TokenProduct kProductAvx2;
#endif

}  // namespace wanda::cpu
