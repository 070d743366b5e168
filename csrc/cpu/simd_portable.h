// 8 lanes in the vector language of GCC and Clang, which becomes SSE2, NEON or whatever the target has.
#pragma once

#include "types.h"

namespace WANDA_ISA {

struct Simd {
  static constexpr int kWidth = 8;
  typedef float Float __attribute__((vector_size(32)));
  typedef int32_t Int __attribute__((vector_size(32)));
  using Mask = Int;  // all bits of a lane set, or none

  template <typename T>
  static Float load(const T* p) {
    Float v;
    for (int lane = 0; lane < kWidth; ++lane) v[lane] = to_float(p[lane]);
    return v;
  }
  static Float load(const float* p) {
    Float v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Float v) { memcpy(p, &v, sizeof v); }
  static Float zero() { return Float{}; }
  static Float multiply(Float a, Float b) { return a * b; }
  static Float add_square(Float sum, Float x) { return sum + x * x; }
  static Float sqrt(Float a) {
    for (int lane = 0; lane < kWidth; ++lane) a[lane] = __builtin_sqrtf(a[lane]);
    return a;
  }
  static Int bits(Float a) { return (Int)a; }

  static Int broadcast(int32_t v) { return Int{} + v; }
  static Int load(const int32_t* p) {
    Int v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(int32_t* p, Int v) { memcpy(p, &v, sizeof v); }
  static Int bit_and(Int a, Int b) { return a & b; }
  static Int min(Int a, Int b) { return select(a < b, a, b); }
  static Int max(Int a, Int b) { return select(a < b, b, a); }
  static Int add(Int a, Int b) { return a + b; }
  static Int subtract(Int a, Int b) { return a - b; }
  static Int permute(Int v, Int index) {
    Int result;
    for (int lane = 0; lane < kWidth; ++lane) result[lane] = v[index[lane]];
    return result;
  }
  static Int gather(const int32_t* p, Int index) {
    Int result;
    for (int lane = 0; lane < kWidth; ++lane) result[lane] = p[index[lane]];
    return result;
  }
  static int64_t sum(Int v) {
    int64_t total = 0;
    for (int lane = 0; lane < kWidth; ++lane) total += v[lane];
    return total;
  }
  static int32_t lowest(Int v) {
    int32_t result = v[0];
    for (int lane = 1; lane < kWidth; ++lane) result = smaller(result, (int32_t)v[lane]);
    return result;
  }
  static int32_t highest(Int v) {
    int32_t result = v[0];
    for (int lane = 1; lane < kWidth; ++lane) result = larger(result, (int32_t)v[lane]);
    return result;
  }

  static Mask less(Int a, Int b) { return a < b; }
  static Mask equal(Int a, Int b) { return a == b; }
  static Mask both(Mask a, Mask b) { return a & b; }
  static Mask either(Mask a, Mask b) { return a | b; }
  static Int add_where(Mask mask, Int a, Int b) { return a + (mask & b); }
  static uint32_t to_bits(Mask mask) {
    const Int place = {1, 2, 4, 8, 16, 32, 64, 128};
    return (uint32_t)sum(mask & place);
  }

  // p[lane] = 0 where the lane's bit is set; the others keep their bits.
  template <typename T>
  static void zero_where(uint32_t bits, T* p) {
    for (int lane = 0; lane < kWidth; ++lane) p[lane] = bits >> lane & 1 ? T{} : p[lane];
  }

 private:
  static Int select(Mask mask, Int a, Int b) { return (a & mask) | (b & ~mask); }
};

}  // namespace WANDA_ISA
