// 8 lanes in the vector extension of GCC and Clang, as two halves of 16 bytes. SSE2 and NEON have vectors of that size;
// compilers split wider ones lane by lane.
#pragma once

#include "types.h"

namespace WANDA_ISA {

struct Simd {
  static constexpr int kWidth = 8;
  typedef float Float4 __attribute__((vector_size(16)));
  typedef int32_t Int4 __attribute__((vector_size(16)));
  struct Float {
    Float4 a, b;
  };
  struct Int {
    Int4 a, b;
  };
  using Mask = Int;  // all bits of a lane set, or none

  template <typename T>
  static Float load(const T* p) {
    return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])},
            Float4{to_float(p[4]), to_float(p[5]), to_float(p[6]), to_float(p[7])}};
  }
  static Float load(const float* p) {
    Float v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Float v) { memcpy(p, &v, sizeof v); }
  // The upper 16 bits of each lane.
  static void store_high_words(uint16_t* p, Float v) {
    uint32_t lane[kWidth];
    memcpy(lane, &v, sizeof v);
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint16_t>(lane[i] >> 16);
  }
  static Float multiply(Float x, Float y) { return {x.a * y.a, x.b * y.b}; }
  static Float add_square(Float sum, Float x) { return {sum.a + x.a * x.a, sum.b + x.b * x.b}; }
  static Float multiply_add(Float x, Float y, Float sum) { return {sum.a + x.a * y.a, sum.b + x.b * y.b}; }
  static Float add(Float x, Float y) { return {x.a + y.a, x.b + y.b}; }
  static Float subtract_product(Float from, Float x, Float y) { return {from.a - x.a * y.a, from.b - x.b * y.b}; }
  static Float min(Float x, Float y) { return select(less(x, y), x, y); }
  static Float max(Float x, Float y) { return select(less(y, x), x, y); }
  static Float subtract(Float x, Float y) { return {x.a - y.a, x.b - y.b}; }
  static Float divide(Float x, Float y) { return {x.a / y.a, x.b / y.b}; }
  static Float sqrt(Float x) { return {sqrt(x.a), sqrt(x.b)}; }
  static Int bits(Float x) { return {(Int4)x.a, (Int4)x.b}; }
  static Float as_float(Int x) { return {(Float4)x.a, (Float4)x.b}; }
  static Float broadcast(float v) { return {Float4{v, v, v, v}, Float4{v, v, v, v}}; }

  static Int broadcast(int32_t v) { return {Int4{v, v, v, v}, Int4{v, v, v, v}}; }
  static Int load(const int32_t* p) {
    Int v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(int32_t* p, Int v) { memcpy(p, &v, sizeof v); }
  static Int load_bytes(const uint8_t* p) { return {Int4{p[0], p[1], p[2], p[3]}, Int4{p[4], p[5], p[6], p[7]}}; }
  static void store_bytes(uint8_t* p, Int v) {
    int32_t lane[kWidth];
    store(lane, v);
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(lane[i]);
  }
  static Int bit_and(Int x, Int y) { return {x.a & y.a, x.b & y.b}; }
  static Int min(Int x, Int y) { return select(less(x, y), x, y); }
  static Int max(Int x, Int y) { return select(less(x, y), y, x); }
  static Int add(Int x, Int y) { return {x.a + y.a, x.b + y.b}; }
  static Int subtract(Int x, Int y) { return {x.a - y.a, x.b - y.b}; }
  template <int R>  // lane i holds what lane i ^ R held
  static Int exchange(Int v) {
    const auto within = [](Int4 h) { return Int4{h[R & 3], h[1 ^ (R & 3)], h[2 ^ (R & 3)], h[3 ^ (R & 3)]}; };
    return R & 4 ? Int{within(v.b), within(v.a)} : Int{within(v.a), within(v.b)};
  }
  static Int gather(const int32_t* p, Int index) {
    int32_t at[kWidth];
    store(at, index);
    return {Int4{p[at[0]], p[at[1]], p[at[2]], p[at[3]]}, Int4{p[at[4]], p[at[5]], p[at[6]], p[at[7]]}};
  }
  static int64_t sum(Int v) {
    int64_t total = 0;
    for (int lane = 0; lane < 4; ++lane) total += int64_t{v.a[lane]} + v.b[lane];
    return total;
  }
  static int32_t lowest(Int v) {
    int32_t result = v.a[0];
    for (int lane = 0; lane < 4; ++lane) result = smaller<int32_t>(result, smaller<int32_t>(v.a[lane], v.b[lane]));
    return result;
  }
  static int32_t highest(Int v) {
    int32_t result = v.a[0];
    for (int lane = 0; lane < 4; ++lane) result = larger<int32_t>(result, larger<int32_t>(v.a[lane], v.b[lane]));
    return result;
  }

  static float sum(Float v) {
    const Float4 four = v.a + v.b;
    return (four[0] + four[1]) + (four[2] + four[3]);
  }
  static float lowest(Float v) {
    float result = v.a[0];
    for (int lane = 0; lane < 4; ++lane) result = smaller(result, smaller<float>(v.a[lane], v.b[lane]));
    return result;
  }
  static float highest(Float v) {
    float result = v.a[0];
    for (int lane = 0; lane < 4; ++lane) result = larger(result, larger<float>(v.a[lane], v.b[lane]));
    return result;
  }

  // The lanes whose bits are set.
  static Mask lanes(uint32_t bits) {
    const Int place = {Int4{1, 2, 4, 8}, Int4{16, 32, 64, 128}};
    return equal(bit_and(broadcast((int32_t)bits), place), place);
  }
  static Mask less(Float x, Float y) { return {x.a < y.a, x.b < y.b}; }
  static Mask less(Int x, Int y) { return {x.a < y.a, x.b < y.b}; }
  static Mask equal(Int x, Int y) { return {x.a == y.a, x.b == y.b}; }
  static Mask both(Mask x, Mask y) { return bit_and(x, y); }
  static Mask either(Mask x, Mask y) { return {x.a | y.a, x.b | y.b}; }
  static Int add_where(Mask mask, Int x, Int y) { return add(x, bit_and(mask, y)); }
  static Int increment_where(Mask mask, Int x) { return subtract(x, mask); }
  static uint32_t to_bits(Mask mask) {
    const Int4 place = {1, 2, 4, 8};
    const Int4 low = mask.a & place, high = mask.b & place;
    return (uint32_t)(low[0] | low[1] | low[2] | low[3] | (high[0] | high[1] | high[2] | high[3]) << 4);
  }
  static Float select(Mask mask, Float x, Float y) { return as_float(select(mask, bits(x), bits(y))); }
  static Int select(Mask mask, Int x, Int y) {
    return {(x.a & mask.a) | (y.a & ~mask.a), (x.b & mask.b) | (y.b & ~mask.b)};
  }
  static Float zero_unless(Mask mask, Float x) { return as_float(bit_and(mask, bits(x))); }
  static Float zero_if(Mask mask, Float x) { return {(Float4)(~mask.a & (Int4)x.a), (Float4)(~mask.b & (Int4)x.b)}; }

  // Lane i of v[j] becomes lane j of v[i].
  static void transpose(Float* v) {
    float lanes[kWidth][kWidth], turned[kWidth][kWidth];
    for (int i = 0; i < kWidth; ++i) store(lanes[i], v[i]);
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < kWidth; ++j) turned[i][j] = lanes[j][i];
    }
    for (int i = 0; i < kWidth; ++i) v[i] = load(turned[i]);
  }

  // p[lane] = 0 if the lane is set in the mask or in `bits`. Other lanes keep their bits.
  template <typename T>
  static void zero_where(Mask mask, T* p) {
    zero_where(to_bits(mask), p);
  }
  template <typename T>
  static void zero_where(uint32_t bits, T* p) {
    for (int lane = 0; lane < kWidth; ++lane) p[lane] = bits >> lane & 1 ? T{} : p[lane];
  }

 private:
  static Float4 sqrt(Float4 v) {
    return Float4{__builtin_sqrtf(v[0]), __builtin_sqrtf(v[1]), __builtin_sqrtf(v[2]), __builtin_sqrtf(v[3])};
  }
};

}  // namespace WANDA_ISA
