// Packed rows on the CPU: the kernels of each instruction set (packed_rows_isa.h).
#pragma once

#include "../kernel_arguments.h"

namespace wanda::cpu {

constexpr int64_t kMostStep = 32;  // columns whose bits a kernel reads at once

struct PackedKernels {
  // Writes x as fp32 in the order in which `multiply` reads it, with room for kMostStep columns past each row's last.
  // Returns whether all of x is finite.
  bool (*prepare)(const PackedLinear&, bool finite, float* x);
  // Rows [begin, end) of the weight. Unless all of x is finite, x was prepared with `finite` = false.
  void (*multiply)(const PackedLinear&, bool finite, const float* x, int64_t begin, int64_t end);
  void (*unpack)(const PackedRows&, int element_bytes, void* out, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
extern const PackedKernels kPackedAvx512;  // empty if the compiler lacks AVX-512 VBMI2
extern const PackedKernels kPackedAvx2;
#endif
extern const PackedKernels kPackedPortable;

}  // namespace wanda::cpu
