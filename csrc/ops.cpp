// Registers the torch.ops.wanda_kernels.native_* that both libraries have. It uses PyTorch's stable ABI, so that one
// build serves torch 2.10 and later. The CPU library compiles this file, and so does the CUDA library, with
// -DWANDA_CUDA. cpu_ops.cpp has the operations of the CPU alone.
//
// kernels/wanda_kernels/native/library.py defines the schemas and loads the libraries.
#include "operands.h"

namespace {

using namespace wanda::operands;

void native_add_sq_norm_(Tensor acc, Tensor x) {
  const wanda::Matrix matrix = matrix_of(x, "x");
  float* sums = accumulator_of(acc, matrix.n_cols);
#ifdef WANDA_CUDA
  const CallContext call(acc, wanda::sq_norm_scratch_bytes(matrix));
#else
  const CallContext call(acc);
#endif
  wanda::add_sq_norm(call.context(), matrix, sums);
}

void native_add_sq_norm_segments_(Tensor acc, Tensor x, Tensor offsets) {
  require_floats(acc, "acc");
  const wanda::Matrix matrix = matrix_of(x, "x"), sums = matrix_of(acc, "acc");
  const wanda::Segments segments = segments_of(offsets, matrix);
  require(sums.n_rows == segments.n && sums.n_cols == matrix.n_cols, "acc must be [segments, x's columns]");
#ifdef WANDA_CUDA
  const CallContext call(acc, wanda::sq_norm_segments_scratch_bytes(matrix, segments));
#else
  const CallContext call(acc);
#endif
  wanda::add_sq_norm_segments(call.context(), matrix, segments, sums);
}

void native_prune_rows_(Tensor weight, OptionalTensor root, OptionalTensor scale, int64_t num_pruned,
                        OptionalTensor mask) {
  const wanda::StackSelection selection = stack_selection_of(weight, root, scale, mask);
  require(0 <= num_pruned && num_pruned <= selection.weight.n_cols, "num_pruned out of range");
#ifdef WANDA_CUDA
  require(selection.weight.col_stride == 1, "weight's rows must be contiguous");
#endif
  wanda::prune_rows(CallContext(weight).context(), selection, num_pruned);
}

void native_prune_matrix_(Tensor weight, OptionalTensor root, OptionalTensor scale, int64_t rank, OptionalTensor mask) {
  const wanda::Selection selection = selection_of(weight, root, scale, mask);
  require(0 <= rank && rank < weight.numel(), "rank out of range");
#ifdef WANDA_CUDA
  const CallContext call(weight, wanda::matrix_scratch_bytes());
#else
  const CallContext call(weight);
#endif
  wanda::prune_matrix(call.context(), selection, rank);
}

void native_prune_variant_(Tensor weight, OptionalTensor root, OptionalTensor scale, double ratio, Tensor alpha,
                           OptionalTensor mask) {
  const wanda::Selection selection = selection_of(weight, root, scale, mask);
  require(alpha.scalar_type() == ScalarType::Double && alpha.numel() == 1, "alpha must be one float64");
#ifdef WANDA_CUDA
  const CallContext call(weight, wanda::variant_scratch_bytes(selection.weight));
#else
  const CallContext call(weight);
#endif
  wanda::prune_variant(call.context(), selection, ratio, static_cast<double*>(data_of(alpha, "alpha")));
}

Tensor native_packed_linear(Tensor x, Tensor bits, Tensor values, OptionalTensor offsets, OptionalTensor bias) {
  require(x.dim() >= 1 && x.is_contiguous() && x.numel() > 0 && bits.dim() == 2, "x must be contiguous, bits a matrix");
  const int64_t n_cols = x.size(x.dim() - 1), n_x = x.numel() / n_cols, n_rows = bits.size(0);
  require(n_x <= wanda::kPackedLinearRows, "x must have at most ", wanda::kPackedLinearRows, " rows");
  require(dtype_of(values) == dtype_of(x) && (!bias || dtype_of(*bias) == dtype_of(x)),
          "x, values and bias must have one dtype");
  require(!bias || (bias->is_contiguous() && bias->numel() == n_rows), "bias must have ", n_rows, " elements in a row");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n_rows;
  Tensor out = torch::stable::new_empty(x, shape);
  const wanda::PackedLinear s = {
      .x = {data_of(x, "x"), dtype_of(x), n_x, n_cols, n_cols},
      .out = {data_of(out, "out"), dtype_of(x), n_x, n_rows, n_rows},
      .weight = packed_of(bits, values, offsets, n_rows, n_cols),
      .bias = bias ? data_of(*bias, "bias") : nullptr,
  };
  wanda::packed_linear(CallContext(x).context(), s);
  return out;
}

void register_operations(torch::stable::detail::StableLibrary& library) {
  library.impl("native_add_sq_norm_", TORCH_BOX(&native_add_sq_norm_));
  library.impl("native_add_sq_norm_segments_", TORCH_BOX(&native_add_sq_norm_segments_));
  library.impl("native_prune_rows_", TORCH_BOX(&native_prune_rows_));
  library.impl("native_prune_matrix_", TORCH_BOX(&native_prune_matrix_));
  library.impl("native_prune_variant_", TORCH_BOX(&native_prune_variant_));
  library.impl("native_packed_linear", TORCH_BOX(&native_packed_linear));
}

}  // namespace

#ifdef WANDA_CUDA
STABLE_TORCH_LIBRARY_IMPL(wanda_kernels, CUDA, library) { register_operations(library); }
#else
STABLE_TORCH_LIBRARY_IMPL(wanda_kernels, CPU, library) { register_operations(library); }
#endif
