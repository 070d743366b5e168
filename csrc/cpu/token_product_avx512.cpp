// VDPBF16PS multiplies and adds 32 bf16 pairs in one instruction, twice the rate of fp32.
#if defined(__x86_64__)
#include "token_product.h"

#if defined(__AVX512BF16__)
#define WANDA_ISA wanda_token_product_avx512
#include "simd_avx512.h"
// Needs the vectors above.
#include "token_product_isa.h"

namespace WANDA_ISA {

struct Bf16 {
  static constexpr int kTokens = 2;
  static Simd::Int pack(const float* even, const float* odd, Simd::Mask inside) {
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(Simd::load_where(inside, even));
    if (odd == nullptr) return _mm512_cvtepu16_epi32(low);
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(Simd::load_where(inside, odd));
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static Simd::Float multiply_add(Simd::Float sum, Simd::Int a, Simd::Int b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace WANDA_ISA

namespace wanda::cpu {
extern const TokenProduct kFp32ProductAvx512 = WANDA_ISA::token_product<WANDA_ISA::Fp32>();
extern const TokenProduct kBf16ProductAvx512 = WANDA_ISA::token_product<WANDA_ISA::Bf16>();
}  // namespace wanda::cpu
#else
namespace wanda::cpu {
extern const TokenProduct kFp32ProductAvx512 = {};
extern const TokenProduct kBf16ProductAvx512 = {};
}  // namespace wanda::cpu
#endif
#endif
