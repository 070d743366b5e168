// Packed rows in portable C++: the next values go to their lanes one by one.
#define WANDA_ISA wanda_packed_portable
#include "simd_portable.h"

namespace WANDA_ISA {

template <typename T>
struct EachLane {
  using Element = T;
  // One row of x at a time: the compiler takes minutes for more, under sanitizers.
  static constexpr int kStep = 8, kParts = 1, kMostX = 1;
  static constexpr int64_t slot(int64_t column) { return column; }
  static int expand(const T* values, uint32_t mask, Simd::Float* parts) {
    float lanes[8];
    int count = 0;
    for (int i = 0; i < 8; ++i) {
      const int has_value = static_cast<int>(mask >> i & 1);
      lanes[i] = float_of(bits_of(to_float(values[count])) & -has_value);
      count += has_value;
    }
    parts[0] = Simd::load(lanes);
    return count;
  }
  static Simd::Float keep(uint32_t mask, int, Simd::Float x) {
    float lanes[8];
    Simd::store(lanes, x);
    for (int i = 0; i < 8; ++i) lanes[i] = mask >> i & 1 ? lanes[i] : 0.0f;
    return Simd::load(lanes);
  }
};

// Adds the lanes 4 apart, then 2 apart, then 1 apart.
inline float sum_of_pairs(Simd::Float v) {
  const Simd::Float4 four = v.a + v.b;
  return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace WANDA_ISA

// Needs the structs above.
#include "packed_rows_isa.h"

namespace wanda::cpu {
extern const PackedKernels kPackedPortable =
    WANDA_ISA::Packed<WANDA_ISA::EachLane<float>, WANDA_ISA::EachLane<WANDA_ISA::Half>,
                      WANDA_ISA::EachLane<WANDA_ISA::BFloat>, WANDA_ISA::EachElement<uint16_t>,
                      WANDA_ISA::EachElement<uint32_t>>::kernels;
}
