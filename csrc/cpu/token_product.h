// acc += a^T b over tokens, with fp32 sums: the kernels of each instruction set and operand type (token_product_isa.h).
// Operands are packed into panels of as many columns as a vector has lanes. A panel has one 32-bit word for each column
// and unit of tokens. A unit is one token in fp32, or two tokens in bf16.
#pragma once

#include "../kernel_arguments.h"

namespace wanda::cpu {

struct TokenProduct {
  int64_t panel;           // columns of a panel
  int64_t tokens;          // tokens of a unit
  int64_t panels_at_once;  // the most panels of a that one call of add_panels should get
  // Packs columns [panel * i, panel * i + panel) of x, fp32 [n_tokens, n_cols], into units_of(n_tokens) * panel words.
  // Words past the last token or column become zeros.
  void (*pack_panel)(const Matrix& x, int64_t i, uint32_t* words);
  // acc[n_rows, n_cols] += a^T b, where a has panels_of(n_rows) panels and b has panels_of(n_cols). With `upper`,
  // elements below the diagonal may be skipped. A sum's order depends on n_units alone.
  void (*add_panels)(const uint32_t* a, const uint32_t* b, int64_t n_units, float* acc, int64_t stride,
                     int64_t n_rows, int64_t n_cols, bool upper);

  int64_t panels_of(int64_t n_cols) const { return (n_cols + panel - 1) / panel; }
  int64_t units_of(int64_t n_tokens) const { return (n_tokens + tokens - 1) / tokens; }
};

#if defined(__x86_64__)
extern const TokenProduct kFp32ProductAvx512, kBf16ProductAvx512;  // empty if the compiler lacks AVX-512-BF16
extern const TokenProduct kFp32ProductAvx2;
#endif

}  // namespace wanda::cpu
