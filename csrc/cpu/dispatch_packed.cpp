// Packed rows on the CPU: chooses the kernels for this machine and shares the rows of the weight among threads.
#include "packed_rows.h"
#include "parallel.h"

namespace wanda {
namespace {

using cpu::kernels;

const cpu::PackedKernels& packed_kernels() {
#if defined(__x86_64__)
  static const bool expands = cpu::kPackedAvx512.multiply && __builtin_cpu_supports("avx512vbmi2");
  if (&kernels() == &cpu::kAvx512 && expands) return cpu::kPackedAvx512;
  if (&kernels() != &cpu::kPortable) return cpu::kPackedAvx2;
#endif
  return cpu::kPackedPortable;
}

}  // namespace

void packed_linear(const Context& context, const PackedLinear& s) {
  if (s.weight.n_rows == 0 || s.weight.n_cols == 0) return;
  const cpu::PackedKernels& isa = packed_kernels();
  const ScratchMemory memory(s.x.n_rows * (s.x.n_cols + cpu::kMostStep) * sizeof(float));
  float* const x = static_cast<float*>(memory.get());
  const bool finite = isa.prepare(s, true, x);
  if (!finite) isa.prepare(s, false, x);
  parallel_for(context, s.weight.n_rows, row_grain(s.x.n_rows * s.x.n_cols),
               [&](int64_t begin, int64_t end) { isa.multiply(s, finite, x, begin, end); });
}

void unpack_rows(const Context& context, const PackedRows& packed, int element_bytes, void* out) {
  if (packed.n_rows == 0 || packed.n_cols == 0) return;
  const cpu::PackedKernels& isa = packed_kernels();
  parallel_for(context, packed.n_rows, row_grain(packed.n_cols),
               [&](int64_t begin, int64_t end) { isa.unpack(packed, element_bytes, out, begin, end); });
}

}  // namespace wanda
