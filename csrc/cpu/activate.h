// The operands of add_coactivation_'s matrix product: abs(act(x))^power in fp32.
// Plain loops over floats, which the compiler vectorises for each instruction set.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

using wanda::Activation;

// exp(x) to 2 ulp for x in [-87, 88.3]. Smaller x give exp(-87), larger ones infinity.
inline float exponential(float x) {
  x = smaller(larger(x, -87.0f), 89.0f);
  // Adding 1.5 * 2^23 rounds x / ln 2 to the nearest integer n.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // r = x - n ln 2, with ln 2 split in two parts.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // The polynomial of Cephes' expf.
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float two_to_n = float_of(static_cast<int32_t>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23));
  return (p * r * r + r + 1.0f) * two_to_n;
}

// erfc(z) for z >= 0 with a relative error of 1.2e-7 (Numerical Recipes, erfcc).
inline float complementary_error(float z) {
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return t * exponential(p - z * z);
}

template <Activation kActivation>
float activation_of(float x) {
  if (kActivation == Activation::kSilu) return x / (1.0f + exponential(-x));
  if (kActivation == Activation::kGelu) {
    const float tail = 0.5f * complementary_error(__builtin_fabsf(x) * 0.70710678f);
    return x * (x < 0 ? tail : 1.0f - tail);
  }
  // 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u))
  if (kActivation == Activation::kGeluTanh) {
    return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
  }
  if (kActivation == Activation::kRelu) return x < 0 ? 0.0f : x;
  return x;
}

template <Activation kActivation, int kPower, typename T>
void activate_rows(const Matrix& x, float* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* source = row_of<T>(x, row);
    float* target = out + row * x.n_cols;
    for (int64_t col = 0; col < x.n_cols; ++col) {
      const float value = activation_of<kActivation>(to_float(source[col]));
      target[col] = kPower == 2 ? value * value : __builtin_fabsf(value);
    }
  }
}

template <Activation kActivation, int kPower>
void activate_dtype(const Matrix& x, float* out, int64_t begin, int64_t end) {
  switch (x.dtype) {
    case DType::kFloat: return activate_rows<kActivation, kPower, float>(x, out, begin, end);
    case DType::kHalf: return activate_rows<kActivation, kPower, Half>(x, out, begin, end);
    case DType::kBFloat: return activate_rows<kActivation, kPower, BFloat>(x, out, begin, end);
  }
}

template <Activation kActivation>
void activate_power(const Matrix& x, int power, float* out, int64_t begin, int64_t end) {
  if (power == 2) return activate_dtype<kActivation, 2>(x, out, begin, end);
  activate_dtype<kActivation, 1>(x, out, begin, end);
}

inline void activate(const Matrix& x, Activation activation, int power, float* out, int64_t begin, int64_t end) {
  switch (activation) {
    case Activation::kNone: return activate_power<Activation::kNone>(x, power, out, begin, end);
    case Activation::kSilu: return activate_power<Activation::kSilu>(x, power, out, begin, end);
    case Activation::kGelu: return activate_power<Activation::kGelu>(x, power, out, begin, end);
    case Activation::kGeluTanh: return activate_power<Activation::kGeluTanh>(x, power, out, begin, end);
    case Activation::kRelu: return activate_power<Activation::kRelu>(x, power, out, begin, end);
  }
}

}  // namespace WANDA_ISA
