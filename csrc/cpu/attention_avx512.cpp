// bf16 products use VDPBF16PS. Its operands are bf16, so the softmax's numerators are rounded to bf16, as in torch's
// kernel.
#if defined(__x86_64__)
#include "attention.h"

#if defined(__AVX512BF16__)
#define WANDA_ISA wanda_attention_avx512
#include "simd_avx512.h"
// Needs the vectors above.
#include "attention_isa.h"

namespace WANDA_ISA {

struct Bf16 {
  using Element = BFloat;
  using Numerator = BFloat;
  static constexpr int kPerUnit = 2;
  static Simd::Float multiply_add(Simd::Float sum, Simd::Int a, Simd::Int b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static Simd::Int units(const BFloat* p) { return _mm512_loadu_si512(p); }
  static Simd::Int join(const BFloat* rows, int64_t stride, bool both) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)rows);
    const __m256i second = both ? _mm256_loadu_si256((const __m256i*)(rows + stride)) : _mm256_setzero_si256();
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
    return _mm512_or_si512(high, _mm512_cvtepu16_epi32(first));
  }
  static void store(BFloat* p, Simd::Float v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
};

}  // namespace WANDA_ISA

namespace wanda::cpu {
extern const AttentionKernels kAttentionAvx512 = WANDA_ISA::attention_kernels<WANDA_ISA::Bf16>();
}
#else
namespace wanda::cpu {
extern const AttentionKernels kAttentionAvx512 = {};
}
#endif
#endif
