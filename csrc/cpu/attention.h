// Causal attention on the CPU, by instruction set; see attention_isa.h.
#pragma once

#include <cstddef>

#include "../kernels.h"

namespace wanda::cpu {

struct AttentionKernels {
  size_t (*scratch_bytes)(const Attention&);
  // Heads [begin, end) of all batches' heads, on the calling thread.
  void (*attend)(const Attention&, int64_t begin, int64_t end, void* scratch);
};

#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx512;  // empty where the compiler knows no AVX-512-BF16: GCC before 10
extern const AttentionKernels kAttentionAvx2;
#endif

}  // namespace wanda::cpu
