// How an operation reaches the CPU's kernels: the instruction set in use, torch's threads, scratch memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>

#include "../launch.h"
#include "kernels_cpu.h"

namespace wanda {

using cpu::Kernels;

constexpr int64_t kGrainElements = 1 << 15;  // less than this is not worth waking a thread

// The widest that this machine runs, or the one that WANDA_KERNELS_CPU_ISA names; read at every call, for tests.
const Kernels& kernels();

class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t n_cols) : ScratchMemory(cpu::scratch_bytes(n_cols)) {}
  explicit ScratchMemory(size_t n_bytes) : memory_(::operator new(n_bytes, kAlignment)) {}
  ~ScratchMemory() { ::operator delete(memory_, kAlignment); }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;
  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* memory_;
};

// Bodies take their Kernels from outside: an exception here, not in a thread, keeps its sentence.
template <typename Body>
void parallel_for(const Context& context, int64_t n, int64_t grain, const Body& body) {
  auto call = [](int64_t begin, int64_t end, void* closure) { (*static_cast<const Body*>(closure))(begin, end); };
  context.parallel_for(0, n, grain, call, const_cast<Body*>(&body));
}

// Items 0 to n - 1, each taken by whichever thread is free: cores that other work shares are not equally fast.
class Items {
 public:
  explicit Items(int64_t n) : n_(n) {}
  bool take(int64_t& item) { return (item = next_++) < n_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t n_;
};

// body(items) once a thread.
template <typename Body>
void share_out(const Context& context, int64_t n, const Body& body) {
  Items items(n);
  parallel_for(context, std::min<int64_t>(n, context.n_threads), 1, [&](int64_t, int64_t) { body(items); });
}

}  // namespace wanda
