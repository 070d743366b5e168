// out = x weight^T + bias on the CPU: the kernels that prepare groups of a weight's rows and multiply with them.
#pragma once

#include <cstddef>

#include "../kernel_arguments.h"

namespace wanda::cpu {

// The kernels of one instruction set, for fp32 and bf16.
struct LinearKernels {
  int64_t rows;        // rows of the weight in a group
  int64_t tokens;      // tokens of x in a tile
  size_t cache_bytes;  // of prepared groups that are multiplied with all tokens before the next ones are prepared
  size_t (*group_bytes)(const Matrix& weight);
  // Prepares the group that begins at `row`; the last one may be shorter. False: it does not fit the compressed format.
  bool (*prepare)(const Matrix& weight, int64_t row, void* group);
  // Writes output columns [first_row, end_row) of tokens [begin, end); `groups` holds those rows.
  void (*multiply)(const Linear&, void* groups, int64_t first_row, int64_t end_row, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
extern const LinearKernels kSparseAvx512;  // rows = 0 if the compiler lacks AVX-512-BF16 or VBMI2
extern const LinearKernels kSparseAvx2;
extern const LinearKernels kDenseAvx2;  // its format holds every weight
#endif

}  // namespace wanda::cpu

namespace wanda {

struct Context;

// Returns false, with `out` unfinished, if a group does not fit the compressed format.
bool multiply_in_groups(const Context&, const Linear&, const cpu::LinearKernels&);

}  // namespace wanda
