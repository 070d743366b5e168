// Causal attention on the CPU; see attention_avx512.cpp.
#pragma once

#include <cstddef>

#include "../kernels.h"

namespace wanda::cpu {

#if defined(__x86_64__)
extern const bool kAttentionCompiled;  // false where the compiler knows no AVX-512-BF16: GCC before 10
size_t attention_scratch_bytes(const Attention&);
// Heads [begin, end) of all batches' heads, on the calling thread.
void attend_avx512(const Attention&, int64_t begin, int64_t end, void* scratch);
#endif

}  // namespace wanda::cpu
