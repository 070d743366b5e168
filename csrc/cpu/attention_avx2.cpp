// AVX2 has no bf16 products, so packing widens bf16 to fp32.
#if defined(__x86_64__)
#include "attention.h"

#define WANDA_ISA wanda_attention_avx2
#include "simd_avx2.h"
// Needs the vectors above.
#include "attention_isa.h"

namespace wanda::cpu {
extern const AttentionKernels kAttentionAvx2 = WANDA_ISA::attention_kernels<WANDA_ISA::Widened<WANDA_ISA::BFloat>>();
}
#endif
