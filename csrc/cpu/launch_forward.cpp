// What a block's forward on the CPU takes from us: which machines have it, and how it is cut among threads.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>

#include "attention.h"
#include "launching.h"
#include "linear.h"

namespace wanda {
namespace {

constexpr int64_t kPartsOfThread = 12;  // of a linear

// Null: none for the instruction set in use.
const cpu::AttentionKernels* attention_kernels() {
#if defined(__x86_64__)
  static const bool brain = cpu::kAttentionAvx512.attend && __builtin_cpu_supports("avx512bf16");
  if (&kernels() == &cpu::kAvx512 && brain) return &cpu::kAttentionAvx512;
  if (&kernels() != &cpu::kPortable) return &cpu::kAttentionAvx2;
#endif
  return nullptr;
}

// The kernels for a pruned weight of this dtype, or for a dense one, where they are faster here than torch's own
// product; else null.
const cpu::LinearKernels* linear_kernels(DType dtype, bool sparse) {
  if (dtype == DType::kHalf) return nullptr;
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd");
  // Permutations and multiply-adds have ports of their own on AMD's cores; on Intel's they share two.
  static const bool permutes = cpu::kSparseAvx512.rows && amd && __builtin_cpu_supports("avx512bf16") &&
                               __builtin_cpu_supports("avx512vbmi2");
  if (&kernels() == &cpu::kAvx512) return sparse && permutes ? &cpu::kSparseAvx512 : nullptr;
  if (&kernels() == &cpu::kAvx2 && sparse) return &cpu::kSparseAvx2;
  if (&kernels() == &cpu::kAvx2 && amd) return &cpu::kDenseAvx2;  // no Intel was measured
#endif
  return nullptr;
}

}  // namespace

void rms_norm(const Context& context, const Matrix& x, const void* weight, float epsilon, const Matrix& out) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / x.n_cols);
  const Kernels& isa = kernels();
  parallel_for(context, x.n_rows, grain, [&](int64_t begin, int64_t end) {
    isa.rms_norm(x, weight, epsilon, out, begin, end);
  });
}

void gated_product(const Context& context, const Matrix& gate, const Matrix& up, Activation activation,
                   const Matrix& out) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / gate.n_cols);
  const Kernels& isa = kernels();
  parallel_for(context, gate.n_rows, grain, [&](int64_t begin, int64_t end) {
    isa.gated_product(gate, up, activation, out, begin, end);
  });
}

void rotate(const Context& context, const Rotation& rotation) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (rotation.n_heads * rotation.head_dim));
  const Kernels& isa = kernels();
  parallel_for(context, rotation.n_batches * rotation.n_tokens, grain,
               [&](int64_t begin, int64_t end) { isa.rotate(rotation, begin, end); });
}

bool attends(DType dtype, int64_t head_dim) {
#if defined(__x86_64__)
  if (attention_kernels() == nullptr || head_dim % 32 != 0 || dtype == DType::kHalf) return false;
  if (dtype == DType::kFloat || &kernels() == &cpu::kAvx2) return true;  // no Intel with AVX2 was measured
  static const bool tiles = [] {  // AMX-BF16, which torch's own kernel uses
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  }();
  return attention_kernels() == &cpu::kAttentionAvx512 && !tiles;
#else
  return false;
#endif
}

void attend(const Context& context, const Attention& attention) {
  const cpu::AttentionKernels& isa = *attention_kernels();
  share_out(context, attention.n_batches * attention.n_heads, [&](Items& heads) {
    const ScratchMemory scratch(isa.scratch_bytes(attention));
    for (int64_t head; heads.take(head);) isa.attend(attention, head, head + 1, scratch.get());
  });
}

bool multiplies(DType dtype, bool sparse) { return linear_kernels(dtype, sparse) != nullptr; }

bool linear(const Context& context, const Linear& s, bool sparse) {
  const cpu::LinearKernels& way = *linear_kernels(s.weight.dtype, sparse);
  const size_t group_bytes = way.group_bytes(s.weight);
  const int64_t n_groups = (s.weight.n_rows + way.rows - 1) / way.rows;
  const int64_t n_cached = std::clamp<int64_t>(way.cache_bytes / group_bytes, 1, n_groups);
  // Of tokens: parts enough to share out, each a whole number of tiles.
  const int64_t n_tokens = s.x.n_rows, n_parts = kPartsOfThread * context.n_threads;
  const int64_t n_each = std::max<int64_t>(1, n_tokens / way.tokens / n_parts) * way.tokens;
  const ScratchMemory memory(n_cached * group_bytes);
  char* const groups = static_cast<char*>(memory.get());
  for (int64_t first = 0; first < n_groups; first += n_cached) {
    const int64_t last = std::min(n_groups, first + n_cached);
    std::atomic<bool> fits{true};
    parallel_for(context, last - first, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && fits; ++i) {
        if (!way.prepare(s.weight, (first + i) * way.rows, groups + i * group_bytes)) fits = false;
      }
    });
    if (!fits) return false;
    share_out(context, (n_tokens + n_each - 1) / n_each, [&](Items& parts) {
      for (int64_t part; parts.take(part);) {
        way.multiply(s, groups, first * way.rows, std::min(last * way.rows, s.weight.n_rows), part * n_each,
                     std::min((part + 1) * n_each, n_tokens));
      }
    });
  }
  return true;
}

}  // namespace wanda
