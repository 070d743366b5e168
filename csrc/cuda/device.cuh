// Element types, keys and launches, for every kernel. tests/wanda_kernels/cuda_on_cpu.h replaces the CUDA runtime in
// tests of the kernels' logic, which then run on every machine.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../api.h"

namespace wanda {

constexpr int kVector = 8;  // columns that a thread processes at once: 16 bytes of fp16, one byte of mask
// The most static shared memory of any kernel; test_native_cuda_build.py checks it.
constexpr size_t kMostStaticBytes = 9 << 10;

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(BFloat value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ inline float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

// The key (kernel_arguments.h) of the weight at (row, col).
template <typename T>
__device__ uint32_t key_of(const Selection& s, T w, int64_t row, int64_t col) {
  float score = to_float(w);
  if (s.root != nullptr) score = __fmul_rn(score, s.root[col]);
  if (s.scale != nullptr) score = __fmul_rn(score, __fsqrt_rn(s.scale[row * s.scale_stride + col]));
  const uint32_t magnitude = __float_as_uint(score) & 0x7fffffffu;
  return magnitude < kNaNKey ? magnitude : kNaNKey;
}

template <typename T>
__device__ T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}

__device__ inline uint8_t* mask_row(const Selection& s, int64_t row) {
  return s.mask + row * ((s.weight.n_cols + 7) / 8);
}

// kCount neighbouring elements. If `aligned`, whole packs are accessed in 16-byte chunks, otherwise one by one.
// Elements from `n_cols` on read as zero and are not written.
template <typename T, int kCount>
struct Pack {
  T values[kCount];

  __device__ void load(const T* row, int64_t col, int64_t n_cols, bool aligned) {
    if (aligned && col + kCount <= n_cols) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const uint4 chunk = reinterpret_cast<const uint4*>(row + col)[i];
        memcpy(&values[i * kPerChunk], &chunk, sizeof chunk);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = col + i < n_cols ? row[col + i] : T{};
  }
  __device__ void store(T* row, int64_t col, int64_t n_cols, bool aligned) {
    if (aligned && col + kCount <= n_cols) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        uint4 chunk;
        memcpy(&chunk, &values[i * kPerChunk], sizeof chunk);
        reinterpret_cast<uint4*>(row + col)[i] = chunk;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (col + i < n_cols) row[col + i] = values[i];
    }
  }

 private:
  static constexpr int kPerChunk = sizeof(uint4) / sizeof(T), kChunks = kCount / kPerChunk;
};

template <typename T>
bool is_aligned(const Matrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride * sizeof(T) % 16 == 0;
}

// call(T{}) with the matrix's element type.
template <typename Call>
void for_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat: return call(float{});
    case DType::kHalf: return call(Half{});
    case DType::kBFloat: return call(BFloat{});
  }
}

#ifdef __CUDACC__

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

inline size_t shared_memory_limit() {
  int device = 0, limit = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(limit);
}

inline void allow_dynamic_shared(const void* kernel, size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

template <typename... Params, typename... Args>
void start(void (*kernel)(Params...), dim3 grid, int n_threads, size_t shared_bytes, void* stream, Args... args) {
  kernel<<<grid, n_threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError());
}

inline void clear(void* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

#endif

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, int n_threads, size_t shared_bytes, void* stream, Args... args) {
  // 48 KiB need no permission, but they include the kernel's static shared memory. So every launch with dynamic shared
  // memory asks for permission.
  if (shared_bytes > 0) allow_dynamic_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  start(kernel, grid, n_threads, shared_bytes, stream, args...);
}

}  // namespace wanda
