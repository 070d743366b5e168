// Aligned memory for vectors. Everything is in an anonymous namespace: these functions are compiled for several
// instruction sets, and the linker must not replace one by another.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace wanda::cpu {
namespace {

constexpr size_t rounded_up(size_t n_bytes) { return (n_bytes + 63) / 64 * 64; }

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(size_t n) { return Floats(static_cast<float*>(std::aligned_alloc(64, rounded_up(n * sizeof(float))))); }

}  // namespace
}  // namespace wanda::cpu
