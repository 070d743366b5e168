// bf16 is fp32 from its packing on: AVX2 has no products of it.
#if defined(__x86_64__)
#include "attention.h"

#define WANDA_ISA wanda_attention_avx2
#include "simd_avx2.h"
// After its vectors.
#include "attention_isa.h"

namespace wanda::cpu {
extern const AttentionKernels kAttentionAvx2 = WANDA_ISA::attention_kernels<WANDA_ISA::Widened<WANDA_ISA::BFloat>>();
}
#endif
