// Products with a pruned weight on the CPU; see sparse_linear_avx512.cpp.
#pragma once

#include <cstddef>

#include "../kernels.h"

namespace wanda::cpu {

#if defined(__x86_64__)
constexpr int64_t kSparseRows = 16;    // rows of a weight that are compressed together
constexpr int64_t kSparseTokens = 8;   // tokens of x that meet them at once
extern const bool kSparseLinearCompiled;  // false where the compiler knows no AVX-512-BF16 or VBMI2

size_t compressed_bytes(const Matrix& weight);  // of kSparseRows rows
// Rows from `row` on, kSparseRows or as many as there are. False: they hold more than the format does.
bool compress_rows(const Matrix& weight, int64_t row, void* compressed);
// Output columns [first_row, end_row) of tokens [begin, end); `compressed` holds those rows.
void multiply_sparse(const SparseLinear&, const void* compressed, int64_t first_row, int64_t end_row, int64_t begin,
                     int64_t end);
#endif

}  // namespace wanda::cpu
