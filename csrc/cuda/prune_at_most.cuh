// Prunes every key up to a threshold, of each row or of the matrix: the last pass of prune_matrix_ and prune_variant_.
#pragma once

#include "device.cuh"

namespace wanda {

constexpr uint32_t kNone = 0xffffffffu;  // a threshold that prunes nothing
constexpr int kPruningThreads = 512;

template <typename T>
constexpr bool is_narrow = sizeof(T) == 2;

// Without a scale, the magnitude bits of a 16-bit weight serve as its key.
__device__ inline uint32_t narrow_key(BFloat w) { return min(w.bits & 0x7fffu, 0x7f81u); }
__device__ inline uint32_t narrow_key(Half w) { return min(w.bits & 0x7fffu, 0x7c01u); }
__device__ inline uint32_t narrow_key(float) { return 0; }  // never called

// The key of NaN, which is the largest key.
__host__ __device__ inline uint32_t nan_key(BFloat) { return 0x7f81; }
__host__ __device__ inline uint32_t nan_key(Half) { return 0x7c01; }
__host__ __device__ inline uint32_t nan_key(float) { return kNaNKey; }

template <typename T, bool kNarrow>
__device__ uint32_t matrix_key(const Selection& s, T w, int64_t row, int64_t col) {
  return kNarrow ? narrow_key(w) : key_of(s, w, row, col);
}

template <typename T, bool kNarrow>
__global__ void __launch_bounds__(kPruningThreads)
    prune_at_most_kernel(Selection s, const uint32_t* thresholds, int64_t threshold_stride, bool aligned) {
  const int64_t n_cols = s.weight.n_cols, per_row = (n_cols + kVector - 1) / kVector;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPruningThreads + threadIdx.x;
  if (index >= per_row * s.weight.n_rows) return;
  // A 64-bit division costs as much as the rest of the kernel.
  const bool is_short = per_row * s.weight.n_rows <= 0xffffffff;
  const int64_t row = is_short ? static_cast<uint32_t>(index) / static_cast<uint32_t>(per_row) : index / per_row;
  const int64_t first = (index - row * per_row) * kVector;
  const uint32_t threshold = thresholds[row * threshold_stride];
  T* weights = row_of<T>(s.weight, row);
  Pack<T, kVector> pack;
  pack.load(weights, first, n_cols, aligned);
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (first + i >= n_cols) break;
    const uint32_t key = matrix_key<T, kNarrow>(s, pack.values[i], row, first + i);
    if (threshold != kNone && key <= threshold) {
      pack.values[i] = T{};
    } else {
      kept |= 1u << i;
    }
  }
  pack.store(weights, first, n_cols, aligned);
  if (s.mask != nullptr) mask_row(s, row)[first / 8] = static_cast<uint8_t>(kept);
}

// Prunes keys up to the row's threshold, ties included. threshold_stride is 1, or 0 if all rows share one threshold.
template <typename T, bool kNarrow>
void prune_at_most(const Context& context, const Selection& s, const uint32_t* thresholds, int64_t threshold_stride) {
  const int64_t n_bytes = s.weight.n_rows * ((s.weight.n_cols + kVector - 1) / kVector);
  const dim3 blocks(static_cast<unsigned>((n_bytes + kPruningThreads - 1) / kPruningThreads));
  launch(prune_at_most_kernel<T, kNarrow>, blocks, kPruningThreads, 0, context.stream, s, thresholds,
         threshold_stride, is_aligned<T>(s.weight));
}

}  // namespace wanda
