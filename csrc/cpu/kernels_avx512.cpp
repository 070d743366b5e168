#if defined(__x86_64__)
#define WANDA_ISA wanda_avx512
#include "simd_avx512.h"
// Needs the vectors above.
#include "kernels_isa.h"

namespace wanda::cpu {
extern const Kernels kAvx512 = WANDA_ISA::kernels_named("avx512");
}
#endif
