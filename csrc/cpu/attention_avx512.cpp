// Causal attention of fp32 and bf16 with AVX-512: out = softmax(scale * q k^T, masked) v, per sequence and head.
//
// Blocks of 64 queries meet chunks of 512 keys; key tiles beyond the diagonal are not computed. Sums, softmax and
// running maxima (Milakov & Gimelshein 2018, arXiv 1805.02867) are fp32; bf16 products go through VDPBF16PS, for which
// the softmax's numerators become bf16, as in torch's own kernel.
//
// All operands are read in units of 32 bits: one fp32, or two bf16 that one instruction multiplies and adds.
#if defined(__x86_64__)
#include "attention.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace wanda::cpu {
namespace {

constexpr int kWidth = 16;    // units of a vector
constexpr int kRows = 8;      // of a register tile, which is kRows x kColumns of fp32
constexpr int kColumns = 32;  // two vectors
constexpr int64_t kQueries = 64, kKeys = 512;

struct Single {
  using Element = float;
  static constexpr int kPerUnit = 1;
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  // One row of units from one row of elements.
  static __m512i join(const float* rows, int64_t, int64_t col, bool) { return _mm512_loadu_si512(rows + col); }
  static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
};

struct Brain {
  using Element = uint16_t;
  static constexpr int kPerUnit = 2;
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  // One row of units from two rows of elements, the second of which may lie beyond the end.
  static __m512i join(const uint16_t* rows, int64_t stride, int64_t col, bool both) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)(rows + col));
    const __m256i second = both ? _mm256_loadu_si256((const __m256i*)(rows + stride + col)) : _mm256_setzero_si256();
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
    return _mm512_or_si512(high, _mm512_cvtepu16_epi32(first));
  }
  static void store(uint16_t* p, __m512 v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
  }
};

// exp(x) for x <= 0, to 2 ulp; 0 below -87.
inline __m512 exponential(__m512 x) {
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);  // Cephes expf
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps((__mmask16)~tiny, p, n);
}

// c[kRows, kColumns] (+)= a[kRows, n_units] b[n_units, kColumns]; strides in units (of c: floats).
template <typename T>
void multiply_tile(const int32_t* a, int64_t stride_a, const int32_t* b, int64_t stride_b, int64_t n_units, float* c,
                   int64_t stride_c, bool add) {
  __m512 sum[kRows][2];
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) {
      sum[row][half] = add ? _mm512_loadu_ps(c + row * stride_c + half * kWidth) : _mm512_setzero_ps();
    }
  }
  for (int64_t unit = 0; unit < n_units; ++unit) {
    const __m512i left = _mm512_loadu_si512(b + unit * stride_b);
    const __m512i right = _mm512_loadu_si512(b + unit * stride_b + kWidth);
    for (int row = 0; row < kRows; ++row) {
      const __m512i factor = _mm512_set1_epi32(a[row * stride_a + unit]);
      sum[row][0] = T::multiply_add(sum[row][0], factor, left);
      sum[row][1] = T::multiply_add(sum[row][1], factor, right);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(c + row * stride_c + half * kWidth, sum[row][half]);
  }
}

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What one thread needs, carved out of one piece of memory; each part is a multiple of 64 bytes.
template <typename T>
struct Workplace {
  Workplace(const Attention& a, char* memory)
      : n_keys(rounded_up(a.n_tokens, kKeys)), head_units(a.head_dim / T::kPerUnit) {
    const auto take = [&](int64_t n_bytes) {
      char* part = memory;
      memory += n_bytes;
      return part;
    };
    keys = (int32_t*)take(4 * head_units * n_keys);
    values = (int32_t*)take(4 * n_keys / T::kPerUnit * a.head_dim);
    queries = (int32_t*)take(4 * kQueries * head_units);
    scores = (float*)take(4 * kQueries * kKeys);
    numerators = (typename T::Element*)take(4 * kQueries * kKeys);
    sums = (float*)take(4 * kQueries * a.head_dim);
    maxima = (float*)take(4 * kQueries);
    totals = (float*)take(4 * kQueries);
    end = memory;
  }
  int64_t n_keys, head_units;
  int32_t *keys, *values, *queries;   // [head_units, n_keys], [n_keys in units, head_dim], [kQueries, head_units]
  float* scores;                      // [kQueries, kKeys]
  typename T::Element* numerators;    // [kQueries, kKeys]
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

  void pack_keys() {
    const int64_t stride = a_.k.token / T::kPerUnit;  // checked to be whole
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)stride));
    for (int64_t key = 0; key < w_.n_keys; key += kWidth) {
      const int64_t left = std::clamp<int64_t>(a_.n_tokens - key, 0, kWidth);
      const __mmask16 there = (__mmask16)((1u << left) - 1);
      const int32_t* from = (const int32_t*)k_ + key * stride;
      for (int64_t unit = 0; unit < w_.head_units; ++unit) {
        const __m512i units = left == 0 ? _mm512_setzero_si512()
                                        : _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, index, from + unit, 4);
        _mm512_storeu_si512(w_.keys + unit * w_.n_keys + key, units);
      }
    }
  }

  void pack_values() {
    for (int64_t key = 0; key < w_.n_keys; key += T::kPerUnit) {
      int32_t* to = w_.values + key / T::kPerUnit * a_.head_dim;
      for (int64_t col = 0; col < a_.head_dim; col += kWidth) {
        const bool beyond = key >= a_.n_tokens;
        const __m512i units = beyond ? _mm512_setzero_si512()
                                     : T::join(v_ + key * a_.v.token, a_.v.token, col, key + 1 < a_.n_tokens);
        _mm512_storeu_si512(to + col, units);
      }
    }
  }

  // Queries [first, first + kQueries), or up to the last.
  void attend(int64_t first) {
    const int64_t n_queries = std::min(kQueries, a_.n_tokens - first);
    const int64_t n_rows = rounded_up(n_queries, kRows), n_bytes = 4 * w_.head_units;
    for (int64_t row = 0; row < n_rows; ++row) {
      int32_t* to = w_.queries + row * w_.head_units;
      if (row < n_queries) memcpy(to, q_ + (first + row) * a_.q.token, n_bytes);
      else memset(to, 0, n_bytes);
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
      const __m512 factor = _mm512_set1_ps(1.0f / w_.totals[row]);
      for (int64_t col = 0; col < a_.head_dim; col += kWidth) {
        const __m512 sum = _mm512_loadu_ps(w_.sums + row * a_.head_dim + col);
        T::store(out_ + (first + row) * a_.out.token + col, _mm512_mul_ps(sum, factor));
      }
    }
  }

  void multiply_keys(int64_t key, int64_t n_keys, int64_t n_rows) {
    for (int64_t col = 0; col < n_keys; col += kColumns) {
      for (int64_t row = 0; row < n_rows; row += kRows) {
        multiply_tile<T>(w_.queries + row * w_.head_units, w_.head_units, w_.keys + key + col, w_.n_keys,
                         w_.head_units, w_.scores + row * kKeys + col, kKeys, false);
      }
    }
  }

  // A row's scores become exp(scale * score - maximum), 0 beyond the diagonal; older sums are brought to the maximum.
  void soften(int64_t row, int64_t n_visible, int64_t n_keys) {
    const float* scores = w_.scores + row * kKeys;
    Element* numerators = w_.numerators + row * kKeys;
    const auto visible = [&](int64_t key) {
      return (__mmask16)((1u << std::clamp<int64_t>(n_visible - key, 0, kWidth)) - 1);
    };
    const __m512 scale = _mm512_set1_ps(a_.scale), least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 high = least;
    for (int64_t key = 0; key < n_keys; key += kWidth) {
      high = _mm512_max_ps(high, _mm512_mask_mul_ps(least, visible(key), _mm512_loadu_ps(scores + key), scale));
    }
    const float maximum = std::max(w_.maxima[row], _mm512_reduce_max_ps(high));
    const __m512 minus = _mm512_set1_ps(-maximum);
    __m512 total = _mm512_setzero_ps();
    for (int64_t key = 0; key < n_keys; key += kWidth) {
      const __m512 power = exponential(_mm512_fmadd_ps(_mm512_loadu_ps(scores + key), scale, minus));
      const __m512 numerator = _mm512_maskz_mov_ps(visible(key), power);
      total = _mm512_add_ps(total, numerator);
      T::store(numerators + key, numerator);
    }
    const float past = w_.totals[row] == 0 ? 0 : _mm512_cvtss_f32(exponential(_mm512_set1_ps(w_.maxima[row] - maximum)));
    w_.totals[row] = w_.totals[row] * past + _mm512_reduce_add_ps(total);
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
      const int32_t* values = w_.values + (key + begin) / T::kPerUnit * a_.head_dim;
      for (int64_t row = 0; row < n_rows; row += kRows) {
        const int32_t* numerators = (const int32_t*)(w_.numerators + row * kKeys + begin);
        for (int64_t col = 0; col < a_.head_dim; col += kColumns) {
          multiply_tile<T>(numerators, kKeys / T::kPerUnit, values + col, a_.head_dim, n_units,
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

}  // namespace

extern const bool kAttentionCompiled = true;

size_t attention_scratch_bytes(const Attention& a) {
  if (a.dtype == DType::kFloat) return Workplace<Single>(a, nullptr).end - static_cast<char*>(nullptr);
  return Workplace<Brain>(a, nullptr).end - static_cast<char*>(nullptr);
}

void attend_avx512(const Attention& a, int64_t begin, int64_t end, void* memory) {
  if (a.dtype == DType::kFloat) attend_heads<Single>(a, begin, end, memory);
  else attend_heads<Brain>(a, begin, end, memory);
}

}  // namespace wanda::cpu
#else
namespace wanda::cpu {

extern const bool kAttentionCompiled = false;
size_t attention_scratch_bytes(const Attention&) { return 0; }
void attend_avx512(const Attention&, int64_t, int64_t, void*) {}

}  // namespace wanda::cpu
#endif
#endif
