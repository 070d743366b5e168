#if defined(__x86_64__)
#include "token_product.h"

#define WANDA_ISA wanda_token_product_avx2
#include "simd_avx2.h"
// Needs the vectors above.
#include "token_product_isa.h"

namespace wanda::cpu {
extern const TokenProduct kFp32ProductAvx2 = WANDA_ISA::token_product<WANDA_ISA::Fp32>();
}
#endif
