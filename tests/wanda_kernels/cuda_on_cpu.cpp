// The CUDA operations as C functions on host memory, for test_native_cuda_logic.py. See cuda_on_cpu.h.
#include "cuda_on_cpu.h"

#include "api.h"

namespace {

struct Operands {
  void* weight;
  int64_t dtype, n_matrices, n_rows, n_cols, matrix_stride, stride;
  const float *root, *scale;
  int64_t scale_matrix_stride, scale_stride;
  uint8_t* mask;
};

wanda::Matrix matrix_of(const Operands& o) {
  return {o.weight, static_cast<wanda::DType>(o.dtype), o.n_rows, o.n_cols, o.stride};
}

wanda::Selection selection_of(const Operands& o) { return {matrix_of(o), o.root, o.scale, o.scale_stride, o.mask}; }

wanda::StackSelection stack_selection_of(const Operands& o) {
  const wanda::DType dtype = static_cast<wanda::DType>(o.dtype);
  const wanda::Stack weight = {o.weight, dtype, o.n_matrices, o.n_rows, o.n_cols, o.matrix_stride, o.stride, 1};
  return {weight, o.root, o.scale, o.scale_matrix_stride, o.scale_stride, o.mask};
}

wanda::Context with_scratch(std::vector<char>& memory, size_t bytes) {
  memory.assign(bytes, 0x5A);
  wanda::Context context = {};
  context.scratch = memory.data();
  return context;
}

}  // namespace

extern "C" {

void set_up(bool reverse, int64_t shared_limit) {
  emulator::reverse = reverse;
  emulator::shared_limit = static_cast<size_t>(shared_limit);
}

void prune_rows(const Operands* o, int64_t num_pruned) { wanda::prune_rows({}, stack_selection_of(*o), num_pruned); }

void prune_matrix(const Operands* o, int64_t rank) {
  std::vector<char> memory;
  wanda::prune_matrix(with_scratch(memory, wanda::matrix_scratch_bytes()), selection_of(*o), rank);
}

double prune_variant(const Operands* o, double ratio) {
  std::vector<char> memory;
  double alpha = 0;
  wanda::prune_variant(with_scratch(memory, wanda::variant_scratch_bytes(matrix_of(*o))), selection_of(*o), ratio,
                       &alpha);
  return alpha;
}

// o is x.
void packed_linear(const Operands* o, void* out, int64_t n_rows, const uint8_t* bits, const void* values,
                   int64_t n_values, const int64_t* offsets, const void* bias) {
  const wanda::Matrix x = matrix_of(*o), target = {out, x.dtype, x.n_rows, n_rows, n_rows};
  const int64_t row_values = offsets == nullptr ? n_values / n_rows : 0;
  wanda::packed_linear({}, {x, target, {bits, values, offsets, n_rows, x.n_cols, n_values, row_values}, bias});
}

void add_sq_norm(const Operands* o, float* acc) {
  std::vector<char> memory;
  wanda::add_sq_norm(with_scratch(memory, wanda::sq_norm_scratch_bytes(matrix_of(*o))), matrix_of(*o), acc);
}

void add_sq_norm_segments(const Operands* o, const int64_t* offsets, int64_t n, float* acc, int64_t stride) {
  const wanda::Matrix x = matrix_of(*o), sums = {acc, wanda::DType::kFloat, n, x.n_cols, stride};
  const wanda::Segments segments = {offsets, n};
  std::vector<char> memory;
  wanda::add_sq_norm_segments(with_scratch(memory, wanda::sq_norm_segments_scratch_bytes(x, segments)), x, segments,
                              sums);
}
}
