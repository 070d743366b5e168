// out = x weight^T + bias on the CPU: how a weight is prepared, and the product of what was prepared.
#pragma once

#include <cstddef>

#include "../kernels.h"

namespace wanda::cpu {

// Of one instruction set, for fp32 and bf16.
struct LinearKernels {
  int64_t rows;        // of the weight that are prepared together, as one group
  int64_t tokens;      // of x that meet a group at once
  size_t cache_bytes;  // of prepared groups that all tokens meet before the next ones are prepared
  size_t (*group_bytes)(const Matrix& weight);
  // Rows from `row` on, `rows` or as many as there are. False: they hold more than the format does.
  bool (*prepare)(const Matrix& weight, int64_t row, void* group);
  // Output columns [first_row, end_row) of tokens [begin, end); `groups` holds those rows.
  void (*multiply)(const Linear&, void* groups, int64_t first_row, int64_t end_row, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
extern const LinearKernels kSparseAvx512;  // rows 0 where the compiler knows no AVX-512-BF16 or VBMI2
extern const LinearKernels kSparseAvx2;
extern const LinearKernels kDenseAvx2;  // whose format holds every weight
#endif

}  // namespace wanda::cpu
