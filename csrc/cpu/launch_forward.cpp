// What a block's forward on the CPU takes from us: which machines have it, and how it is cut among threads.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>

#include "attention.h"
#include "launching.h"
#include "sparse_linear.h"

namespace wanda {
namespace {

constexpr size_t kPanelBytes = 1 << 22;      // of a pruned weight, compressed: what a shared L3 holds

// Null: none for the instruction set in use.
const cpu::AttentionKernels* attention_kernels() {
#if defined(__x86_64__)
  if (&kernels() == &cpu::kAvx512 && cpu::kAttentionAvx512.attend) return &cpu::kAttentionAvx512;
  if (&kernels() == &cpu::kAvx2) return &cpu::kAttentionAvx2;
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

bool attends(DType dtype, int64_t head_dim) {
#if defined(__x86_64__)
  if (attention_kernels() == nullptr || head_dim % 32 != 0) return false;
  if (attention_kernels() == &cpu::kAttentionAvx2) return dtype != DType::kHalf;  // no Intel with AVX2 was measured
  static const bool brain = __builtin_cpu_supports("avx512bf16");
  static const bool tiles = [] {  // AMX-BF16, which torch's own kernel uses
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  }();
  return dtype == DType::kFloat || (dtype == DType::kBFloat && brain && !tiles);
#else
  return false;
#endif
}

void attend(const Context& context, const Attention& attention) {
  const cpu::AttentionKernels& isa = *attention_kernels();
  parallel_for(context, attention.n_batches * attention.n_heads, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(isa.scratch_bytes(attention));
    isa.attend(attention, begin, end, scratch.get());
  });
}

bool multiplies_sparse(DType dtype) {
#if defined(__x86_64__)
  // Permutations and multiply-adds have ports of their own on AMD's cores; on Intel's they share two.
  static const bool pays = cpu::kSparseLinearCompiled && __builtin_cpu_is("amd") &&
                           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
  return pays && &kernels() == &cpu::kAvx512 && (dtype == DType::kFloat || dtype == DType::kBFloat);
#else
  return false;
#endif
}

bool sparse_linear(const Context& context, const SparseLinear& s) {
#if defined(__x86_64__)
  const size_t group_bytes = cpu::compressed_bytes(s.weight);
  const int64_t n_groups = (s.weight.n_rows + cpu::kSparseRows - 1) / cpu::kSparseRows;
  const int64_t n_panel = std::clamp<int64_t>(kPanelBytes / group_bytes, 1, n_groups);
  const ScratchMemory memory(n_panel * group_bytes);
  char* const compressed = static_cast<char*>(memory.get());
  for (int64_t first = 0; first < n_groups; first += n_panel) {
    const int64_t last = std::min(n_groups, first + n_panel);
    std::atomic<bool> fits{true};
    parallel_for(context, last - first, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && fits; ++i) {
        if (!cpu::compress_rows(s.weight, (first + i) * cpu::kSparseRows, compressed + i * group_bytes)) fits = false;
      }
    });
    if (!fits) return false;
    const int64_t n_tiles = (s.x.n_rows + cpu::kSparseTokens - 1) / cpu::kSparseTokens;
    parallel_for(context, n_tiles, 1, [&](int64_t begin, int64_t end) {
      cpu::multiply_sparse(s, compressed, first * cpu::kSparseRows, std::min(last * cpu::kSparseRows, s.weight.n_rows),
                           begin * cpu::kSparseTokens, std::min(end * cpu::kSparseTokens, s.x.n_rows));
    });
  }
  return true;
#else
  return false;
#endif
}

}  // namespace wanda
