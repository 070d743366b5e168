// A block's forward on the CPU: chooses the kernels for this machine and shares the work among threads.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "attention.h"
#include "linear.h"
#include "parallel.h"

namespace wanda {
namespace {

using cpu::Kernels;
using cpu::kernels;

// Null: the instruction set in use has none.
const cpu::AttentionKernels* attention_kernels() {
#if defined(__x86_64__)
  static const bool bf16 = cpu::kAttentionAvx512.attend && __builtin_cpu_supports("avx512bf16");
  if (&kernels() == &cpu::kAvx512 && bf16) return &cpu::kAttentionAvx512;
  if (&kernels() != &cpu::kPortable) return &cpu::kAttentionAvx2;
#endif
  return nullptr;
}

// The kernels for a pruned or a dense weight of this dtype. Null if torch's product is faster on this machine.
const cpu::LinearKernels* linear_kernels(DType dtype, bool sparse) {
  if (dtype == DType::kHalf) return nullptr;
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd");
  // The AVX-512 kernel needs separate ports for permutations and multiply-adds. AMD's cores have them, Intel's do not.
  static const bool permutes = cpu::kSparseAvx512.rows && amd && __builtin_cpu_supports("avx512bf16") &&
                               __builtin_cpu_supports("avx512vbmi2");
  if (&kernels() == &cpu::kAvx512) return sparse && permutes ? &cpu::kSparseAvx512 : nullptr;
  if (&kernels() == &cpu::kAvx2 && sparse) return &cpu::kSparseAvx2;
  // No Intel processor was measured.
  if (&kernels() == &cpu::kAvx2 && amd) return &cpu::kDenseAvx2;
#endif
  return nullptr;
}

}  // namespace

void rms_norm(const Context& context, const Matrix& x, const void* weight, float epsilon, const Matrix& out) {
  const Kernels& isa = kernels();
  for_rows(context, x, [&](int64_t begin, int64_t end) { isa.rms_norm(x, weight, epsilon, out, begin, end); });
}

void gated_product(const Context& context, const Matrix& gate, const Matrix& up, Activation activation,
                   const Matrix& out) {
  const Kernels& isa = kernels();
  for_rows(context, gate,
           [&](int64_t begin, int64_t end) { isa.gated_product(gate, up, activation, out, begin, end); });
}

void rotate(const Context& context, const Rotation& rotation) {
  const Kernels& isa = kernels();
  parallel_for(context, rotation.n_batches * rotation.n_tokens, row_grain(rotation.n_heads * rotation.head_dim),
               [&](int64_t begin, int64_t end) { isa.rotate(rotation, begin, end); });
}

bool attends(DType dtype, int64_t head_dim) {
#if defined(__x86_64__)
  if (attention_kernels() == nullptr || head_dim % 32 != 0 || dtype == DType::kHalf) return false;
  // No Intel processor with AVX2 was measured.
  if (dtype == DType::kFloat || &kernels() == &cpu::kAvx2) return true;
  // torch's own kernel uses AMX-BF16 where the processor has it, and is faster there.
  static const bool amx_bf16 = [] {
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  }();
  return attention_kernels() == &cpu::kAttentionAvx512 && !amx_bf16;
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

bool linear(const Context& context, const Linear& operands, bool sparse) {
  return multiply_in_groups(context, operands, *linear_kernels(operands.weight.dtype, sparse));
}

}  // namespace wanda
