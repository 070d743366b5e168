// The keys of a row: in registers, in shared memory, or computed again in each pass.
#pragma once

#include <type_traits>

#include "row_search.cuh"

namespace wanda {

// Hides the value from the compiler, which would otherwise compute what depends on it before a loop and keep the
// results in registers.
__device__ inline void opaque(uint32_t& value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
}

// kVector weights of 16 or 32 bits, as 32-bit words.
template <typename T>
struct Words {
  static constexpr int kChunks = kVector * sizeof(T) / sizeof(uint4);
  uint32_t words[4 * kChunks];

  __device__ void load(const T* at) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      // A streaming load: the L1 keeps the roots, which all rows share.
      const uint4 chunk = __ldcs(reinterpret_cast<const uint4*>(at) + i);
      words[4 * i] = chunk.x, words[4 * i + 1] = chunk.y, words[4 * i + 2] = chunk.z, words[4 * i + 3] = chunk.w;
    }
  }
  __device__ void store(T* at) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      reinterpret_cast<uint4*>(at)[i] = uint4{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
    }
  }
  __device__ float value(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, BFloat>) {
      return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else {
      return to_float(Half{static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2])});
    }
  }
  __device__ void clear(int i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = 0;
    } else {
      words[i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
    }
  }
};

__device__ inline uint32_t key_of_score(float score) {
  return min(__float_as_uint(score) & 0x7fffffffu, static_cast<uint32_t>(kNaNKey));
}

enum class Scale { kNone, kVector, kMatrix };

// kVectors vectors per thread, in registers.
template <typename T, int kVectors, Scale kScale, bool kHoldsWeights>
struct RegisterKeys {
  Words<T> weights[kVectors];
  uint32_t keys[kVectors][kVector];

  static __device__ uint32_t column(int v) { return (v * blockDim.x + threadIdx.x) * kVector; }

  __device__ __forceinline__ void load(const T* row, uint32_t n_cols) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = {};
      if (column(v) < n_cols) weights[v].load(row + column(v));
    }
  }
  // Returns the thread's largest key. `factors` are the roots, or the row of the scale matrix.
  __device__ __forceinline__ uint32_t compute(const T* row, const float* factors, uint32_t n_cols) {
    uint32_t highest = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) < n_cols) {
        if constexpr (!kHoldsWeights) weights[v].load(row + column(v));
        Words<float> factor;
        if constexpr (kScale == Scale::kVector) load_roots(factor, factors + column(v));
        if constexpr (kScale == Scale::kMatrix) factor.load(factors + column(v));
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          float score = weights[v].value(i);
          if constexpr (kScale == Scale::kVector) score = __fmul_rn(score, factor.value(i));
          if constexpr (kScale == Scale::kMatrix) score = __fmul_rn(score, __fsqrt_rn(factor.value(i)));
          keys[v][i] = key_of_score(score);
          highest = max(highest, keys[v][i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) keys[v][i] = kIgnored;
      }
    }
    return highest;
  }
  template <typename Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) body(keys[v][i]);
    }
  }
  // Appends the keys in [low, high], which are few, to the candidates.
  __device__ __forceinline__ void collect(Search& search, uint32_t low, uint32_t high) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t nearest = kIgnored;
#pragma unroll
      for (int i = 0; i < kVector; ++i) nearest = min(nearest, keys[v][i] - low);
      if (nearest > high - low) continue;
      uint32_t wanted = 0, begin = low, col = column(v);
      opaque(begin);
#pragma unroll
      for (int i = 0; i < kVector; ++i) wanted |= static_cast<uint32_t>(keys[v][i] - begin <= high - low) << i;
      uint64_t* next = &search.candidates[atomicAdd(&search.n_candidates, static_cast<uint32_t>(__popc(wanted)))];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (wanted >> i & 1) *next++ = uint64_t{keys[v][i]} << 32 | (col + i);
      }
    }
  }
  __device__ __forceinline__ void turn_into_columns(uint32_t bound) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) keys[v][i] = tie_key(keys[v][i], bound, column(v) + i);
    }
  }

 private:
  static __device__ void load_roots(Words<float>& to, const float* at) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(at) + i);
      to.words[4 * i] = chunk.x, to.words[4 * i + 1] = chunk.y, to.words[4 * i + 2] = chunk.z,
                   to.words[4 * i + 3] = chunk.w;
    }
  }
};

// Keys of a row of any length: in shared memory if kShared, otherwise computed on every access.
template <typename T, bool kShared>
struct LongKeys {
  const Selection& s;
  int64_t row;
  uint32_t* shared;
  bool are_columns = false;
  uint32_t bound = 0;

  __device__ uint32_t computed(uint32_t col) const { return key_of(s, row_of<T>(s.weight, row)[col], row, col); }
  __device__ uint32_t key(uint32_t col) const {
    const uint32_t key = kShared ? shared[col] : computed(col);
    return are_columns ? tie_key(key, bound, col) : key;
  }
  // Returns the thread's largest key.
  __device__ uint32_t compute() const {
    uint32_t highest = 0;
    for_columns([&](uint32_t col) {
      const uint32_t each = computed(col);
      if (kShared) shared[col] = each;
      highest = max(highest, each);
    });
    return highest;
  }
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    for_columns([&](uint32_t col) { body(key(col)); });
  }
  __device__ void collect(Search& search, uint32_t low, uint32_t high) const {
    for_columns([&](uint32_t col) {
      const uint32_t each = key(col);
      if (each - low > high - low) return;
      search.candidates[atomicAdd(&search.n_candidates, 1u)] = uint64_t{each} << 32 | col;
    });
  }
  __device__ void turn_into_columns(uint32_t of_ties) { are_columns = true, bound = of_ties; }

 private:
  template <typename Body>
  __device__ void for_columns(const Body& body) const {
#pragma unroll 1
    for (uint32_t col = threadIdx.x; col < s.weight.n_cols; col += blockDim.x) body(col);
  }
};

}  // namespace wanda
