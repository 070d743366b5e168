// The parts of attention_isa.h below its loops: element types, exp, the product of one register tile, and the buffers of
// one thread.
#pragma once

#include <cstdint>

#include "attention.h"

namespace WANDA_ISA {

using wanda::Attention;

constexpr int kWidth = Simd::kWidth;  // units of a vector
// A register tile is kRows x kColumns of fp32; kColumns is two vectors.
constexpr int kRows = kWidth == 16 ? 8 : 6, kColumns = 2 * kWidth;
// A block of queries is whole tiles. It is multiplied with chunks of kKeys.
constexpr int64_t kQueries = kWidth == 16 ? 64 : 48, kKeys = 512;

// fp32, or elements that packing widens to fp32.
template <typename T>
struct Widened {
  using Element = T;        // type of q, k, v and out
  using Numerator = float;  // type of the softmax's numerators
  static constexpr int kPerUnit = 1;
  static Simd::Float multiply_add(Simd::Float sum, Simd::Int a, Simd::Int b) {
    return Simd::multiply_add(Simd::as_float(a), Simd::as_float(b), sum);
  }
  // A vector of units from one row.
  static Simd::Int units(const T* p) { return Simd::bits(Simd::load(p)); }
  // One row of units from kPerUnit rows of elements. `both` is false if the second row is past the end.
  static Simd::Int join(const T* rows, int64_t, bool) { return units(rows); }
  template <typename To>  // Element, Numerator
  static void store(To* p, Simd::Float v) {
    Simd::store(p, v);
  }
};

// exp(x) for x <= 0 to 2 ulp. x < -87 gives 0.
inline Simd::Float exponential(Simd::Float x) {
  const Simd::Float n = Simd::nearest_integer(Simd::multiply(x, Simd::broadcast(1.44269504f)));
  // r = x - n ln 2, with ln 2 split in two parts.
  Simd::Float r = Simd::subtract_product(x, n, Simd::broadcast(0.693359375f));
  r = Simd::multiply_add(n, Simd::broadcast(2.12194440e-4f), r);
  // The polynomial of Cephes' expf.
  Simd::Float p = Simd::broadcast(1.9875691500e-4f);
  p = Simd::multiply_add(p, r, Simd::broadcast(1.3981999507e-3f));
  p = Simd::multiply_add(p, r, Simd::broadcast(8.3334519073e-3f));
  p = Simd::multiply_add(p, r, Simd::broadcast(4.1665795894e-2f));
  p = Simd::multiply_add(p, r, Simd::broadcast(1.6666665459e-1f));
  p = Simd::multiply_add(p, r, Simd::broadcast(5.0000001201e-1f));
  p = Simd::add(Simd::multiply_add(Simd::multiply(p, r), r, r), Simd::broadcast(1.0f));
  return Simd::zero_if(Simd::less(x, Simd::broadcast(-87.0f)), Simd::times_two_to(n, p));
}

// c[kRows, kColumns] (+)= a[kRows, n_units] b[n_units, kColumns]; strides in units (of c: floats), b contiguous.
template <typename T>
void multiply_tile(const int32_t* a, int64_t stride_a, const int32_t* b, int64_t n_units, float* c, int64_t stride_c,
                   bool add) {
  Simd::Float sum[kRows][2];
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) {
      sum[row][half] = add ? Simd::load(c + row * stride_c + half * kWidth) : Simd::broadcast(0.0f);
    }
  }
  for (int64_t unit = 0; unit < n_units; ++unit) {
    const Simd::Int left = Simd::load(b + unit * kColumns);
    const Simd::Int right = Simd::load(b + unit * kColumns + kWidth);
    for (int row = 0; row < kRows; ++row) {
      const Simd::Int factor = Simd::broadcast(a[row * stride_a + unit]);
      sum[row][0] = T::multiply_add(sum[row][0], factor, left);
      sum[row][1] = T::multiply_add(sum[row][1], factor, right);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) Simd::store(c + row * stride_c + half * kWidth, sum[row][half]);
  }
}

constexpr int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One thread's buffers, in one piece of memory. Each is a multiple of 64 bytes.
template <typename T>
struct Buffers {
  Buffers(const Attention& a, char* memory)
      : n_keys(rounded_up(a.n_tokens, kKeys)), head_units(a.head_dim / T::kPerUnit) {
    const auto take = [&](int64_t n_bytes) {
      char* part = memory;
      memory += rounded_up(n_bytes, 64);
      return part;
    };
    keys = (int32_t*)take(4 * head_units * n_keys);
    values = (int32_t*)take(4 * n_keys / T::kPerUnit * a.head_dim);
    queries = (int32_t*)take(4 * kQueries * head_units);
    scores = (float*)take(4 * kQueries * kKeys);
    numerators = (typename T::Numerator*)take(4 * kQueries * kKeys);
    sums = (float*)take(4 * kQueries * a.head_dim);
    maxima = (float*)take(4 * kQueries);
    totals = (float*)take(4 * kQueries);
    end = memory;
  }
  int64_t n_keys, head_units;
  // Keys and values are in panels of kColumns, so that tiles read consecutive cache lines whatever the strides.
  int32_t* keys;                      // [n_keys / kColumns, head_units, kColumns]
  int32_t* values;                    // [head_dim / kColumns, n_keys in units, kColumns]
  int32_t* queries;                   // [kQueries, head_units]
  float* scores;                      // [kQueries, kKeys]
  typename T::Numerator* numerators;  // [kQueries, kKeys]
  float *sums, *maxima, *totals;      // [kQueries, head_dim], [kQueries] twice
  char* end;
};

}  // namespace WANDA_ISA
