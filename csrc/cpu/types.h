// The element types of the kernels. Code that is compiled once per instruction set is in a namespace of that name,
// since the linker could otherwise put the AVX-512 form of an inline function into the portable path.
#pragma once

#include <cstdint>
#include <cstring>

namespace WANDA_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat value) { return float_of(static_cast<int32_t>(uint32_t{value.bits} << 16)); }
inline float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(static_cast<int32_t>(sign | 0x7f800000 | magnitude << 13));
  // Read as fp32, the exponent is 112 too small. The product is exact, also for subnormals.
  const float scaled = float_of(static_cast<int32_t>(magnitude << 13)) * 0x1p112f;
  return float_of(static_cast<int32_t>(sign | static_cast<uint32_t>(bits_of(scaled))));
}

template <typename T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

}  // namespace WANDA_ISA
