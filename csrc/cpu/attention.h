// Causal attention on the CPU: the kernels of each instruction set (attention_isa.h).
#pragma once

#include <cstddef>

#include "../kernel_arguments.h"

namespace wanda::cpu {

struct AttentionKernels {
  size_t (*scratch_bytes)(const Attention&);
  // Heads [begin, end), numbered through all batches, on the calling thread.
  void (*attend)(const Attention&, int64_t begin, int64_t end, void* scratch);
};

#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx512;  // empty if the compiler lacks AVX-512-BF16 (GCC before 10)
extern const AttentionKernels kAttentionAvx2;
#endif

}  // namespace wanda::cpu
