// The operands of add_gated_coactivation_'s matrix products: (up * act'(gate))^2 and act(gate)^2 in fp32, in one pass.
#pragma once

#include "activate.h"

namespace WANDA_ISA {

struct Activated {
  float value, slope;  // act(x) and act'(x)
};

template <Activation kActivation>
Activated activated_of(float x) {
  if (kActivation == Activation::kSilu) {
    const float s = 1.0f / (1.0f + exponential(-x));
    return {x * s, s + x * s * (1.0f - s)};
  }
  if (kActivation == Activation::kGelu) {
    const float tail = 0.5f * complementary_error(__builtin_fabsf(x) * 0.70710678f);
    const float below = x < 0 ? tail : 1.0f - tail;
    return {x * below, below + x * 0.39894228f * exponential(-0.5f * x * x)};
  }
  // x * s(v), where s is the sigmoid.
  if (kActivation == Activation::kGeluTanh) {
    const float s = 1.0f / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
    return {x * s, s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * x * x)};
  }
  if (kActivation == Activation::kRelu) return {x < 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};
  return {x, 1.0f};
}

template <Activation kActivation, typename T>
void activate_gated_rows(const Matrix& gate, const Matrix& up, float* out, int64_t begin, int64_t end) {
  const int64_t n = gate.n_cols;
  for (int64_t row = begin; row < end; ++row) {
    const T *g = row_of<T>(gate, row), *u = row_of<T>(up, row);
    float *of_gate = out + row * 2 * n, *of_up = of_gate + n;
    for (int64_t col = 0; col < n; ++col) {
      const Activated act = activated_of<kActivation>(to_float(g[col]));
      const float effect = to_float(u[col]) * act.slope;
      of_gate[col] = effect * effect;
      of_up[col] = act.value * act.value;
    }
  }
}

template <Activation kActivation>
void activate_gated_dtype(const Matrix& gate, const Matrix& up, float* out, int64_t begin, int64_t end) {
  switch (gate.dtype) {
    case DType::kFloat: return activate_gated_rows<kActivation, float>(gate, up, out, begin, end);
    case DType::kHalf: return activate_gated_rows<kActivation, Half>(gate, up, out, begin, end);
    case DType::kBFloat: return activate_gated_rows<kActivation, BFloat>(gate, up, out, begin, end);
  }
}

inline void activate_gated(const Matrix& gate, const Matrix& up, Activation activation, float* out, int64_t begin,
                           int64_t end) {
  switch (activation) {
    case Activation::kNone: return activate_gated_dtype<Activation::kNone>(gate, up, out, begin, end);
    case Activation::kSilu: return activate_gated_dtype<Activation::kSilu>(gate, up, out, begin, end);
    case Activation::kGelu: return activate_gated_dtype<Activation::kGelu>(gate, up, out, begin, end);
    case Activation::kGeluTanh: return activate_gated_dtype<Activation::kGeluTanh>(gate, up, out, begin, end);
    case Activation::kRelu: return activate_gated_dtype<Activation::kRelu>(gate, up, out, begin, end);
  }
}

}  // namespace WANDA_ISA
