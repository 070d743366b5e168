#if defined(__x86_64__)
#include "token_product.h"

#define WANDA_ISA wanda_token_product_avx2
#include "simd_avx2.h"
// After its vectors.
#include "token_product_isa.h"

namespace wanda::cpu {
extern const TokenProduct kProductAvx2 = WANDA_ISA::token_product<WANDA_ISA::Single>();
}
#endif
