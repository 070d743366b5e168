// Reductions and scans of one warp or block.
#pragma once

#include "device.cuh"

namespace wanda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ T inclusive_scan_of_warp(T value) {
  const int lane = threadIdx.x % kWarp;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// Sum over the threads before this one. blockDim.x is a multiple of kWarp.
template <typename T>
__device__ T exclusive_scan_of_block(T value) {
  __shared__ T of_warp[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, n_warps = blockDim.x / kWarp;
  const T inclusive = inclusive_scan_of_warp(value);
  __syncthreads();  // of_warp may still be read from an earlier call
  if (lane == kWarp - 1) of_warp[warp] = inclusive;
  __syncthreads();
  T before = inclusive - value;
  for (int i = 0; i < n_warps; ++i) before += i < warp ? of_warp[i] : T{0};
  return before;
}

// of_warp: shared memory, one element per warp.
__device__ inline uint32_t max_of_block(uint32_t* of_warp, uint32_t value) {
  const unsigned lane = threadIdx.x % kWarp, n_warps = blockDim.x / kWarp;
  value = __reduce_max_sync(kAllLanes, value);
  if (lane == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, lane < n_warps ? of_warp[lane] : 0);
}

// The bin of a histogram that holds a sorted position: its index, the position within the bin, and the bin's count.
template <typename Count>
struct BinOfRank {
  int bin;
  Count rank, count;
};

}  // namespace wanda
