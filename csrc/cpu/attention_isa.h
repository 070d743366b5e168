// Causal attention of fp32 and bf16: out = softmax(scale * q k^T, masked) v, per sequence and head. Included by one
// file for each instruction set, after its simd_*.h.
//
// Blocks of queries meet chunks of 512 keys; key tiles beyond the diagonal are not computed. Sums, softmax and
// running maxima (Milakov & Gimelshein 2018, arXiv 1805.02867) are fp32.
//
// All operands are read in units of 32 bits: one fp32, or two bf16 that one instruction multiplies and adds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention.h"

namespace WANDA_ISA {

using wanda::Attention;
using wanda::DType;

constexpr int kWidth = Simd::kWidth;         // units of a vector
constexpr int kRows = kWidth == 16 ? 8 : 6;  // of a register tile, which is kRows x kColumns of fp32
constexpr int kColumns = 2 * kWidth;         // two vectors
constexpr int64_t kQueries = kWidth == 16 ? 64 : 48, kKeys = 512;  // of a block, whole tiles; of a chunk

// fp32, or what becomes fp32 when it is packed.
template <typename T>
struct Widened {
  using Element = T;        // of q, k, v and out
  using Numerator = float;  // of the softmax
  static constexpr int kPerUnit = 1;
  static Simd::Float multiply_add(Simd::Float sum, Simd::Int a, Simd::Int b) {
    return Simd::multiply_add(Simd::as_float(a), Simd::as_float(b), sum);
  }
  // A vector of units from one row.
  static Simd::Int units(const T* p) { return Simd::bits(Simd::load(p)); }
  // One row of units from kPerUnit rows of elements, the second of which may lie beyond the end.
  static Simd::Int join(const T* rows, int64_t, bool) { return units(rows); }
  template <typename To>  // Element, Numerator
  static void store(To* p, Simd::Float v) {
    Simd::store(p, v);
  }
};

// exp(x) for x <= 0, to 2 ulp; 0 below -87.
inline Simd::Float exponential(Simd::Float x) {
  const Simd::Float n = Simd::nearest_integer(Simd::multiply(x, Simd::broadcast(1.44269504f)));
  Simd::Float r = Simd::subtract_product(x, n, Simd::broadcast(0.693359375f));  // ln 2 in two parts
  r = Simd::multiply_add(n, Simd::broadcast(2.12194440e-4f), r);
  Simd::Float p = Simd::broadcast(1.9875691500e-4f);  // Cephes expf
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

// What one thread needs, carved out of one piece of memory; each part is a multiple of 64 bytes.
template <typename T>
struct Workplace {
  Workplace(const Attention& a, char* memory)
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
  // In panels of kColumns, for which tiles read whole cache lines in turn, whatever the strides:
  int32_t* keys;                      // [n_keys / kColumns, head_units, kColumns]
  int32_t* values;                    // [head_dim / kColumns, n_keys in units, kColumns]
  int32_t* queries;                   // [kQueries, head_units]
  float* scores;                      // [kQueries, kKeys]
  typename T::Numerator* numerators;  // [kQueries, kKeys]
  float *sums, *maxima, *totals;      // [kQueries, head_dim], [kQueries] twice
  char* end;
};

template <typename T>
class Head {
 public:
  Head(const Attention& a, const Workplace<T>& w, int64_t batch, int64_t head) : a_(a), w_(w) {
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

  // Queries [first, first + kQueries), or up to the last.
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
      for (int64_t row = 0; row < n_rows; ++row) soften(row, first + row + 1 - key, n_keys);
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

  // A row's scores become exp(scale * score - maximum), 0 beyond the diagonal; older sums are brought to the maximum.
  void soften(int64_t row, int64_t n_visible, int64_t n_keys) {
    const float* scores = w_.scores + row * kKeys;
    Numerator* numerators = w_.numerators + row * kKeys;
    n_visible = std::clamp<int64_t>(n_visible, 0, n_keys);
    const int64_t n_whole = n_visible / kWidth * kWidth, end = rounded_up(n_visible, kWidth);
    const auto last = Simd::first(n_visible - n_whole);  // of the vector that the diagonal crosses
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
    constexpr int64_t kTile = 128;  // of keys: 16 KiB of values of 64 bf16 columns
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
  const Workplace<T>& w_;
  const Element *q_, *k_, *v_;
  Element* out_;
};

template <typename T>
void attend_heads(const Attention& a, int64_t begin, int64_t end, void* memory) {
  const Workplace<T> workplace(a, (char*)memory);
  for (int64_t index = begin; index < end; ++index) {
    Head<T>(a, workplace, index / a.n_heads, index % a.n_heads).run();
  }
}

template <typename Brain>
size_t scratch_bytes(const Attention& a) {
  if (a.dtype == DType::kFloat) return Workplace<Widened<float>>(a, nullptr).end - static_cast<char*>(nullptr);
  return Workplace<Brain>(a, nullptr).end - static_cast<char*>(nullptr);
}

template <typename Brain>
void attend(const Attention& a, int64_t begin, int64_t end, void* memory) {
  if (a.dtype == DType::kFloat) attend_heads<Widened<float>>(a, begin, end, memory);
  else attend_heads<Brain>(a, begin, end, memory);
}

// Brain: how bf16 is packed and multiplied.
template <typename Brain>
constexpr wanda::cpu::AttentionKernels attention_kernels() {
  return {scratch_bytes<Brain>, attend<Brain>};
}

}  // namespace WANDA_ISA
