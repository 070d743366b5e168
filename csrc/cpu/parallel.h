// How an operation spreads over the CPU's cores: torch's threads, and scratch memory for each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>

#include "../api.h"
#include "kernels.h"

namespace wanda {

constexpr int64_t kGrainElements = 1 << 15;  // less work than this does not pay for waking a thread

// The smallest number of rows for one thread.
inline int64_t row_grain(int64_t n_cols) { return std::max<int64_t>(1, kGrainElements / n_cols); }

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

// body(begin, end) over ranges of [0, n), each at least `grain` long. Look up kernels() before the call: its exception
// would lose its message inside a thread.
template <typename Body>
void parallel_for(const Context& context, int64_t n, int64_t grain, const Body& body) {
  auto call = [](int64_t begin, int64_t end, void* closure) { (*static_cast<const Body*>(closure))(begin, end); };
  context.parallel_for(0, n, grain, call, const_cast<Body*>(&body));
}

// body(begin, end) over ranges of a matrix's rows.
template <typename Body>
void for_rows(const Context& context, const Matrix& matrix, const Body& body) {
  parallel_for(context, matrix.n_rows, row_grain(matrix.n_cols), body);
}

// body(begin, end, scratch) over ranges of a matrix's rows.
template <typename Body>
void for_rows_with_scratch(const Context& context, const Matrix& matrix, const Body& body) {
  for_rows(context, matrix, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(matrix.n_cols);
    body(begin, end, scratch.get());
  });
}

// Items 0 to n - 1. A thread takes the next one when it is free, since cores that run other work are slower.
class Items {
 public:
  explicit Items(int64_t n) : n_(n) {}
  bool take(int64_t& item) { return (item = next_++) < n_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t n_;
};

// body(items), once on each thread.
template <typename Body>
void share_out(const Context& context, int64_t n, const Body& body) {
  Items items(n);
  parallel_for(context, std::min<int64_t>(n, context.n_threads), 1, [&](int64_t, int64_t) { body(items); });
}

}  // namespace wanda
