#if defined(__x86_64__)
#define WANDA_ISA wanda_avx2
#include "simd_avx2.h"
// Needs the vectors above.
#include "kernels_isa.h"

namespace wanda::cpu {
extern const Kernels kAvx2 = WANDA_ISA::kernels_named("avx2");
}
#endif
