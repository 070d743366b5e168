// The elementwise operations between a block's matmuls, in one pass each: RMSNorm, a gated MLP's act(gate) * up, and
// the rotary embedding. fp32 and bf16. Intermediate values are rounded where torch's separate operations round them.
#pragma once

#include "activate.h"

namespace WANDA_ISA {

using wanda::Rotation;

template <typename T>
T rounded(float value);
template <>
inline float rounded(float value) {
  return value;
}
// To nearest, ties to even. A NaN stays a NaN.
template <>
inline BFloat rounded(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest)};
}

template <typename T>
void rms_norm_rows(const Matrix& x, const T* weight, float epsilon, const Matrix& out, int64_t begin, int64_t end) {
  constexpr int64_t kSums = 64;  // partial sums, which keep several vector additions in flight
  for (int64_t row = begin; row < end; ++row) {
    const T* source = row_of<T>(x, row);
    T* target = row_of<T>(out, row);
    float sums[kSums] = {};
    int64_t col = 0;
    for (; col + kSums <= x.n_cols; col += kSums) {
      for (int64_t i = 0; i < kSums; ++i) sums[i] += to_float(source[col + i]) * to_float(source[col + i]);
    }
    for (int64_t i = 0; col + i < x.n_cols; ++i) sums[i] += to_float(source[col + i]) * to_float(source[col + i]);
    for (int64_t n = kSums / 2; n > 0; n /= 2) {
      for (int64_t i = 0; i < n; ++i) sums[i] += sums[n + i];
    }
    const float factor = 1.0f / __builtin_sqrtf(sums[0] / static_cast<float>(x.n_cols) + epsilon);
    for (int64_t i = 0; i < x.n_cols; ++i) {
      target[i] = rounded<T>(to_float(weight[i]) * to_float(rounded<T>(to_float(source[i]) * factor)));
    }
  }
}

inline void rms_norm(const Matrix& x, const void* weight, float epsilon, const Matrix& out, int64_t begin,
                     int64_t end) {
  if (x.dtype == DType::kFloat) rms_norm_rows(x, static_cast<const float*>(weight), epsilon, out, begin, end);
  else rms_norm_rows(x, static_cast<const BFloat*>(weight), epsilon, out, begin, end);
}

template <Activation kActivation, typename T>
void gated_product_rows(const Matrix& gate, const Matrix& up, const Matrix& out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *g = row_of<T>(gate, row), *u = row_of<T>(up, row);
    T* target = row_of<T>(out, row);
// `out` may be `gate` or `up`; no other overlap is allowed.
#pragma GCC ivdep
    for (int64_t col = 0; col < gate.n_cols; ++col) {
      const T activated = rounded<T>(activation_of<kActivation>(to_float(g[col])));
      target[col] = rounded<T>(to_float(activated) * to_float(u[col]));
    }
  }
}

template <Activation kActivation>
void gated_product_dtype(const Matrix& gate, const Matrix& up, const Matrix& out, int64_t begin, int64_t end) {
  if (gate.dtype == DType::kFloat) gated_product_rows<kActivation, float>(gate, up, out, begin, end);
  else gated_product_rows<kActivation, BFloat>(gate, up, out, begin, end);
}

inline void gated_product(const Matrix& gate, const Matrix& up, Activation activation, const Matrix& out,
                          int64_t begin, int64_t end) {
  switch (activation) {
    case Activation::kNone: return gated_product_dtype<Activation::kNone>(gate, up, out, begin, end);
    case Activation::kSilu: return gated_product_dtype<Activation::kSilu>(gate, up, out, begin, end);
    case Activation::kGelu: return gated_product_dtype<Activation::kGelu>(gate, up, out, begin, end);
    case Activation::kGeluTanh: return gated_product_dtype<Activation::kGeluTanh>(gate, up, out, begin, end);
    case Activation::kRelu: return gated_product_dtype<Activation::kRelu>(gate, up, out, begin, end);
  }
}

template <typename T>
void rotate_tokens(const Rotation& r, int64_t begin, int64_t end) {
  const int64_t half = r.head_dim / 2;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / r.n_tokens, token = i % r.n_tokens, turn = batch * r.turn_batch + token * r.turn_token;
    const T *cos = static_cast<const T*>(r.cos) + turn, *sin = static_cast<const T*>(r.sin) + turn;
    for (int64_t head = 0; head < r.n_heads; ++head) {
      const T* x = static_cast<const T*>(r.x.data) + batch * r.x.batch + head * r.x.head + token * r.x.token;
      T* out = static_cast<T*>(r.out.data) + batch * r.out.batch + head * r.out.head + token * r.out.token;
      const auto term = [](T value, T factor) { return to_float(rounded<T>(to_float(value) * to_float(factor))); };
#pragma GCC ivdep
      for (int64_t d = 0; d < half; ++d) {
        out[d] = rounded<T>(term(x[d], cos[d]) - term(x[half + d], sin[d]));
        out[half + d] = rounded<T>(term(x[half + d], cos[half + d]) + term(x[d], sin[half + d]));
      }
    }
  }
}

inline void rotate(const Rotation& r, int64_t begin, int64_t end) {
  if (r.dtype == DType::kFloat) rotate_tokens<float>(r, begin, end);
  else rotate_tokens<BFloat>(r, begin, end);
}

}  // namespace WANDA_ISA
