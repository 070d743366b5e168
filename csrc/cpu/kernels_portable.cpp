#define WANDA_ISA wanda_portable
#include "simd_portable.h"
// Needs the vectors above.
#include "kernels_isa.h"

namespace wanda::cpu {
extern const Kernels kPortable = WANDA_ISA::kernels_named("portable");
}
