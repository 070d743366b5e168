// The parts of CUDA that csrc/cuda/*.cu need to run on one CPU thread. The threads of a block are fibers that run until
// a barrier or a shuffle. With `reverse` they run last to first, so code that lacks a barrier gives different results than
// in the usual order. This tests the kernels' logic. Data races and memory errors on a GPU need compute-sanitizer.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;

struct Barrier {
  int alive = 0, arrived = 0;
  int64_t generation = 0;
  void release_if_complete() {
    if (arrived == 0 || arrived < alive) return;
    arrived = 0;
    ++generation;
  }
};

struct Fiber {
  ucontext_t start;  // the first entry; later ones, also of later blocks, use longjmp, which needs no system call
  jmp_buf resume;
  std::vector<char> stack;
  bool started = false, done = true;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline jmp_buf scheduler_resume;
inline unsigned current;
inline std::function<void()> body;
inline Barrier block;
inline std::vector<Barrier> warps;
inline std::vector<uint64_t> exchange;
inline bool reverse = false;
inline size_t shared_limit = 96 << 10;
// Static and dynamic shared memory that a kernel may use without cudaFuncSetAttribute.
constexpr size_t kFreeSharedBytes = 48 << 10;
// The most static shared memory of any kernel; test_native_cuda_build.py checks it.
constexpr size_t kMostStaticBytes = 9 << 10;
inline std::map<const void*, size_t> allowed_bytes;
alignas(16) inline unsigned char shared_memory[256 << 10];

inline void wait(Barrier& barrier) {
  const int64_t generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_complete();
  while (barrier.generation == generation) {
    if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler_resume, 1);
  }
}

// One thread of every block.
inline void run_fiber() {
  for (;;) {
    body();
    fibers[current].done = true;
    for (Barrier* barrier : {&block, &warps[current / kWarp]}) {
      --barrier->alive;
      barrier->release_if_complete();
    }
    if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler_resume, 1);
  }
}

// Returns when the fiber waits or ends.
inline void run(Fiber& fiber) {
  if (_setjmp(scheduler_resume) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  swapcontext(&scheduler, &fiber.start);
}

inline void prepare(unsigned thread) {
  Fiber& fiber = fibers[thread];
  fiber.done = false;
  if (fiber.started) return;
  fiber.stack.resize(kStackBytes);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
}

inline void run_block(unsigned n_threads) {
  if (fibers.size() < n_threads) fibers.resize(n_threads);
  block = {static_cast<int>(n_threads)};
  warps.assign((n_threads + kWarp - 1) / kWarp, Barrier{kWarp});
  exchange.assign(n_threads, 0);
  memset(shared_memory, 0xAB, sizeof shared_memory);
  for (unsigned thread = 0; thread < n_threads; ++thread) prepare(thread);
  while (block.alive > 0) {
    for (unsigned i = 0; i < n_threads; ++i) {
      current = reverse ? n_threads - 1 - i : i;
      if (fibers[current].done) continue;
      threadIdx = dim3(current);
      run(fibers[current]);
    }
  }
}

template <typename T>
T shuffle(T value, int lane) {
  const unsigned warp = current / kWarp;
  memcpy(&exchange[current], &value, sizeof value);
  wait(warps[warp]);
  memcpy(&value, &exchange[warp * kWarp + static_cast<unsigned>(lane) % kWarp], sizeof value);
  wait(warps[warp]);
  return value;
}

template <typename T>
std::vector<T> of_lanes(T value) {
  const unsigned warp = current / kWarp;
  memcpy(&exchange[current], &value, sizeof value);
  wait(warps[warp]);
  std::vector<T> values(kWarp);
  for (int lane = 0; lane < kWarp; ++lane) memcpy(&values[lane], &exchange[warp * kWarp + lane], sizeof value);
  wait(warps[warp]);
  return values;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::shuffle(value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return emulator::shuffle(value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned, bool bit) {
  const std::vector<uint32_t> bits = emulator::of_lanes<uint32_t>(bit);
  unsigned all = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) all |= bits[lane] << lane;
  return all;
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t value) {
  uint32_t sum = 0;
  for (const uint32_t each : emulator::of_lanes(value)) sum += each;
  return sum;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  for (const uint32_t each : emulator::of_lanes(value)) value = each > value ? each : value;
  return value;
}
// A GPU faults where a load is not aligned to its size.
template <typename T>
T __ldcs(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) abort();
  return *at;
}
template <typename T>
T __ldg(const T* at) {
  return __ldcs(at);
}
template <typename T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline uint16_t __ushort_as_half(uint16_t bits) { return bits; }
inline float __half2float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | magnitude << 13);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}
inline uint16_t __half_as_ushort(uint16_t half) { return half; }
inline uint16_t __float2half_rn(float value) {
  const uint32_t sign = __float_as_uint(value) >> 16 & 0x8000u, magnitude = __float_as_uint(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  // The result's last bit is that of the sum: 2^-24 for subnormals, else 13 bits above the value's own.
  if (magnitude < 0x38800000) return static_cast<uint16_t>(sign | __float_as_uint(std::fabs(value) + 0.5f) - 0x3f000000);
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(unsigned value) { return value == 0 ? 32 : __builtin_clz(value); }

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

using cudaError_t = int;
struct cudaFuncAttributes {};
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace wanda {

inline size_t shared_memory_limit() { return emulator::shared_limit; }
inline unsigned char* dynamic_shared() { return emulator::shared_memory; }
inline void clear(void* memory, size_t bytes, void*) { memset(memory, 0, bytes); }

inline void allow_dynamic_shared(const void* kernel, size_t bytes) { emulator::allowed_bytes[kernel] = bytes; }

template <typename... Params, typename... Args>
void start(void (*kernel)(Params...), dim3 grid, int n_threads, size_t shared_bytes, void*, Args... args) {
  const bool is_allowed = shared_bytes <= emulator::allowed_bytes[reinterpret_cast<const void*>(kernel)];
  const size_t limit = is_allowed ? emulator::shared_limit : emulator::kFreeSharedBytes;
  if (emulator::kMostStaticBytes + shared_bytes > limit) abort();
  emulator::body = [=] { kernel(args...); };
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(n_threads));
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      emulator::run_block(static_cast<unsigned>(n_threads));
    }
  }
}

}  // namespace wanda
