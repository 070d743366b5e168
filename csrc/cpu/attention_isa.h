// Causal attention of fp32 and bf16: out = softmax(scale * q k^T, masked) v, per sequence and head. Each
// attention_*.cpp includes its simd_*.h and then this file.
//
// A block of queries is multiplied with chunks of 512 keys. Key tiles beyond the diagonal are skipped. Sums, softmax
// and running maxima (Milakov & Gimelshein 2018, arXiv 1805.02867) are fp32.
//
// All operands are read in units of 32 bits: one fp32, or two bf16 that one instruction multiplies and adds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention_tile.h"

namespace WANDA_ISA {

using wanda::DType;

template <typename T>
class Head {
 public:
  Head(const Attention& a, const Buffers<T>& w, int64_t batch, int64_t head) : a_(a), w_(w) {
    const int64_t shared = head / (a.n_heads / a.n_kv_heads);
    q_ = (const Element*)a.q.data + batch * a.q.batch + head * a.q.head;
    k_ = (const Element*)a.k.data + batch * a.k.batch + shared * a.k.head;
    v_ = (const Element*)a.v.data + batch * a.v.batch + shared * a.v.head;
    out_ = (Element*)a.out.data + batch * a.out.batch + head * a.out.head;
  }

  void run() {
    pack_keys();
    pack_values();
    for (int64_t first = 0; first < a_.n_tokens; first += kQueries) attend(first);
  }

 private:
  using Element = typename T::Element;
  using Numerator = typename T::Numerator;

  void pack_keys() {
    for (int64_t key = 0; key < w_.n_keys; key += kWidth) {
      const Element* rows = k_ + key * a_.k.token;
      for (int64_t unit = 0; unit < w_.head_units; unit += kWidth) {
        Simd::Float lanes[kWidth];
        for (int64_t row = 0; row < kWidth; ++row) {
          const bool beyond = key + row >= a_.n_tokens;
          const Element* from = rows + row * a_.k.token + unit * T::kPerUnit;
          lanes[row] = beyond ? Simd::broadcast(0.0f) : Simd::as_float(T::units(from));
        }
        Simd::transpose(lanes);
        int32_t* to = w_.keys + key / kColumns * kColumns * w_.head_units + unit * kColumns + key % kColumns;
        for (int64_t i = 0; i < kWidth; ++i) Simd::store(to + i * kColumns, Simd::bits(lanes[i]));
      }
    }
  }

  int64_t panel_of_values(int64_t col) const { return col / kColumns * kColumns * (w_.n_keys / T::kPerUnit); }

  void pack_values() {
    for (int64_t key = 0; key < w_.n_keys; key += T::kPerUnit) {
      for (int64_t col = 0; col < a_.head_dim; col += kWidth) {
        const bool beyond = key >= a_.n_tokens;
        const Simd::Int units = beyond ? Simd::broadcast(0)
                                       : T::join(v_ + key * a_.v.token + col, a_.v.token, key + 1 < a_.n_tokens);
        Simd::store(w_.values + panel_of_values(col) + key / T::kPerUnit * kColumns + col % kColumns, units);
      }
    }
  }

  // The block of queries that begins at `first`; the last one may be shorter.
  void attend(int64_t first) {
    const int64_t n_queries = std::min(kQueries, a_.n_tokens - first);
    const int64_t n_rows = rounded_up(n_queries, kRows);
    for (int64_t row = 0; row < n_rows; ++row) {
      int32_t* to = w_.queries + row * w_.head_units;
      const Element* from = q_ + (first + row) * a_.q.token;
      for (int64_t unit = 0; unit < w_.head_units; unit += kWidth) {
        Simd::store(to + unit, row < n_queries ? T::units(from + unit * T::kPerUnit) : Simd::broadcast(0));
      }
    }
    std::fill(w_.maxima, w_.maxima + n_rows, -std::numeric_limits<float>::infinity());
    std::fill(w_.totals, w_.totals + n_rows, 0.0f);
    std::fill(w_.sums, w_.sums + n_rows * a_.head_dim, 0.0f);
    for (int64_t key = 0; key < first + n_queries; key += kKeys) {
      const int64_t n_keys = rounded_up(std::min(kKeys, first + n_queries - key), kColumns);
      multiply_keys(key, n_keys, n_rows);
      for (int64_t row = 0; row < n_rows; ++row) update_softmax(row, first + row + 1 - key, n_keys);
      multiply_values(key, n_keys, n_rows);
    }
    for (int64_t row = 0; row < n_queries; ++row) {
      const Simd::Float factor = Simd::broadcast(1.0f / w_.totals[row]);
      for (int64_t col = 0; col < a_.head_dim; col += kWidth) {
        const Simd::Float sum = Simd::load(w_.sums + row * a_.head_dim + col);
        T::store(out_ + (first + row) * a_.out.token + col, Simd::multiply(sum, factor));
      }
    }
  }

  void multiply_keys(int64_t key, int64_t n_keys, int64_t n_rows) {
    for (int64_t col = 0; col < n_keys; col += kColumns) {
      for (int64_t row = 0; row < n_rows; row += kRows) {
        multiply_tile<T>(w_.queries + row * w_.head_units, w_.head_units, w_.keys + (key + col) * w_.head_units,
                         w_.head_units, w_.scores + row * kKeys + col, kKeys, false);
      }
    }
  }

  // numerators = exp(scale * score - maximum), and 0 beyond the diagonal. If the row's running maximum grows, its sums
  // are rescaled.
  void update_softmax(int64_t row, int64_t n_visible, int64_t n_keys) {
    const float* scores = w_.scores + row * kKeys;
    Numerator* numerators = w_.numerators + row * kKeys;
    n_visible = std::clamp<int64_t>(n_visible, 0, n_keys);
    const int64_t n_whole = n_visible / kWidth * kWidth, end = rounded_up(n_visible, kWidth);
    // The visible lanes of the vector that the diagonal crosses.
    const auto last = Simd::first(n_visible - n_whole);
    const Simd::Float scale = Simd::broadcast(a_.scale);
    const Simd::Float least = Simd::broadcast(-std::numeric_limits<float>::infinity());
    Simd::Float high = least;
    for (int64_t key = 0; key < end; key += kWidth) {
      const Simd::Float scaled = Simd::multiply(Simd::load(scores + key), scale);
      high = Simd::max(high, key < n_whole ? scaled : Simd::select(last, scaled, least));
    }
    const float maximum = std::max(w_.maxima[row], Simd::highest(high));
    const Simd::Float minus = Simd::broadcast(-maximum);
    Simd::Float total = Simd::broadcast(0.0f);
    for (int64_t key = 0; key < end; key += kWidth) {
      const Simd::Float power = exponential(Simd::multiply_add(Simd::load(scores + key), scale, minus));
      const Simd::Float numerator = key < n_whole ? power : Simd::zero_unless(last, power);
      total = Simd::add(total, numerator);
      T::store(numerators + key, numerator);
    }
    for (int64_t key = end; key < n_keys; key += kWidth) T::store(numerators + key, Simd::broadcast(0.0f));
    const Simd::Float fall = Simd::broadcast(w_.maxima[row] - maximum);
    const float past = w_.totals[row] == 0 ? 0 : Simd::first_lane(exponential(fall));
    w_.totals[row] = w_.totals[row] * past + Simd::sum(total);
    if (w_.maxima[row] != maximum) {
      float* sums = w_.sums + row * a_.head_dim;
      for (int64_t col = 0; col < a_.head_dim; ++col) sums[col] *= past;
      w_.maxima[row] = maximum;
    }
  }

  void multiply_values(int64_t key, int64_t n_keys, int64_t n_rows) {
    constexpr int64_t kTile = 128;  // keys: 16 KiB of values at 64 columns of bf16
    for (int64_t begin = 0; begin < n_keys; begin += kTile) {
      const int64_t n_units = std::min(kTile, n_keys - begin) / T::kPerUnit;
      const int32_t* values = w_.values + (key + begin) / T::kPerUnit * kColumns;
      for (int64_t row = 0; row < n_rows; row += kRows) {
        const int32_t* numerators = (const int32_t*)(w_.numerators + row * kKeys + begin);
        for (int64_t col = 0; col < a_.head_dim; col += kColumns) {
          multiply_tile<T>(numerators, kKeys / T::kPerUnit, values + panel_of_values(col), n_units,
                           w_.sums + row * a_.head_dim + col, a_.head_dim, true);
        }
      }
    }
  }

  const Attention& a_;
  const Buffers<T>& w_;
  const Element *q_, *k_, *v_;
  Element* out_;
};

template <typename T>
void attend_heads(const Attention& a, int64_t begin, int64_t end, void* memory) {
  const Buffers<T> buffers(a, (char*)memory);
  for (int64_t index = begin; index < end; ++index) {
    Head<T>(a, buffers, index / a.n_heads, index % a.n_heads).run();
  }
}

template <typename Bf16>
size_t scratch_bytes(const Attention& a) {
  if (a.dtype == DType::kFloat) return Buffers<Widened<float>>(a, nullptr).end - static_cast<char*>(nullptr);
  return Buffers<Bf16>(a, nullptr).end - static_cast<char*>(nullptr);
}

template <typename Bf16>
void attend(const Attention& a, int64_t begin, int64_t end, void* memory) {
  if (a.dtype == DType::kFloat) attend_heads<Widened<float>>(a, begin, end, memory);
  else attend_heads<Bf16>(a, begin, end, memory);
}

// Bf16 packs and multiplies bf16 on this instruction set.
template <typename Bf16>
constexpr wanda::cpu::AttentionKernels attention_kernels() {
  return {.scratch_bytes = scratch_bytes<Bf16>, .attend = attend<Bf16>};
}

}  // namespace WANDA_ISA
