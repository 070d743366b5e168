// Turns tensors into the kernels' arguments, and provides the resources of a call on this library's device. The checks
// here keep memory accesses valid. Errors that a user can make are found earlier, in dispatch/checks.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "api.h"
#include "require.h"

#ifdef WANDA_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace wanda::operands {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using wanda::require;

inline wanda::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return wanda::DType::kFloat;
    case ScalarType::Half: return wanda::DType::kHalf;
    case ScalarType::BFloat16: return wanda::DType::kBFloat;
    default: throw std::runtime_error("expected float32, float16 or bfloat16");
  }
}

inline void require_floats(const Tensor& tensor, const char* name) {
  require(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

// The tensor's memory. The tensor must be on this library's device.
inline void* data_of(const Tensor& tensor, const char* name) {
#ifdef WANDA_CUDA
  require(tensor.is_cuda(), name, " must be on a GPU");
#else
  require(tensor.is_cpu(), name, " must be on the CPU");
#endif
  return tensor.data_ptr();
}

inline wanda::Matrix matrix_of(const Tensor& tensor, const char* name) {
  require(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
  require(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, "'s rows must be contiguous");
  return {data_of(tensor, name), dtype_of(tensor), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

inline wanda::Segments segments_of(const Tensor& offsets, [[maybe_unused]] const wanda::Matrix& x) {
  const bool fits = offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.is_contiguous();
  require(fits && offsets.numel() > 0, "offsets must be contiguous int64 with an element more than segments");
  const auto* values = static_cast<const int64_t*>(data_of(offsets, "offsets"));
  const int64_t n = offsets.numel() - 1;
#ifndef WANDA_CUDA
  bool ascend = values[0] >= 0 && values[n] <= x.n_rows;
  for (int64_t i = 0; i < n; ++i) ascend = ascend && values[i] <= values[i + 1];
  require(ascend, "offsets must ascend from 0 to at most ", x.n_rows);
#endif
  return {values, n};
}

inline const float* vector_of(const OptionalTensor& vector, const wanda::Matrix& weight, const char* name) {
  if (!vector) return nullptr;
  require_floats(*vector, name);
  const bool fits = vector->dim() == 1 && vector->size(0) == weight.n_cols && vector->is_contiguous();
  require(fits, name, " must be contiguous with ", weight.n_cols, " elements");
  return static_cast<const float*>(data_of(*vector, name));
}

inline uint8_t* mask_of(const OptionalTensor& mask, const wanda::Matrix& weight) {
  if (!mask) return nullptr;
  const int64_t n_bytes = weight.n_rows * ((weight.n_cols + 7) / 8);
  const bool fits = mask->scalar_type() == ScalarType::Byte && mask->numel() == n_bytes && mask->is_contiguous();
  require(fits, "mask must be contiguous uint8 with ", n_bytes, " elements");
  return static_cast<uint8_t*>(data_of(*mask, "mask"));
}

inline wanda::Selection selection_of(const Tensor& weight, const OptionalTensor& root, const OptionalTensor& scale,
                                     const OptionalTensor& mask) {
  const wanda::Matrix matrix = matrix_of(weight, "weight");
  wanda::Selection selection = {
      .weight = matrix,
      .root = vector_of(root, matrix, "root"),
      .scale = nullptr,
      .scale_stride = 0,
      .mask = mask_of(mask, matrix),
  };
  if (scale) {
    require_floats(*scale, "scale");
    const wanda::Matrix squared = matrix_of(*scale, "scale");
    require(!root && squared.n_rows == matrix.n_rows && squared.n_cols == matrix.n_cols,
            "scale must have the weight's shape, and no root beside it");
    selection.scale = static_cast<const float*>(squared.data);
    selection.scale_stride = squared.stride;
  }
  return selection;
}

// A matrix, or a stack of them, of any strides.
inline wanda::Stack stack_of(const Tensor& tensor, const char* name) {
  const int64_t dim = tensor.dim();
  require(dim == 2 || dim == 3, name, " must have 2 or 3 dimensions, got ", dim);
  const bool many = dim == 3;
  const int64_t n_cols = tensor.size(dim - 1);
  return {
      .data = data_of(tensor, name),
      .dtype = dtype_of(tensor),
      .n_matrices = many ? tensor.size(0) : 1,
      .n_rows = tensor.size(dim - 2),
      .n_cols = n_cols,
      .matrix_stride = many ? tensor.stride(0) : 0,
      .row_stride = tensor.stride(dim - 2),
      .col_stride = n_cols <= 1 ? 1 : tensor.stride(dim - 1),
  };
}

// `root` is [n_cols] for each matrix, `scale` has the weight's shape.
inline wanda::StackSelection stack_selection_of(const Tensor& weight, const OptionalTensor& root,
                                                const OptionalTensor& scale, const OptionalTensor& mask) {
  const wanda::Stack stack = stack_of(weight, "weight");
  wanda::StackSelection selection = {.weight = stack, .root = nullptr, .scale = nullptr, .scale_matrix_stride = 0,
                                     .scale_row_stride = 0, .mask = nullptr};
  // The rows of all matrices, for the checks that see only sizes.
  const wanda::Matrix all = {stack.data, stack.dtype, stack.n_matrices * stack.n_rows, stack.n_cols, 0};
  selection.mask = mask_of(mask, all);
  if (root) {
    const int64_t n_roots = stack.n_matrices * stack.n_cols;
    require_floats(*root, "root");
    require(root->numel() == n_roots && root->is_contiguous(), "root must be contiguous with ", n_roots, " elements");
    selection.root = static_cast<const float*>(data_of(*root, "root"));
  }
  if (scale) {
    require_floats(*scale, "scale");
    const wanda::Stack squared = stack_of(*scale, "scale");
    require(!root && scale->dim() == weight.dim() && squared.n_matrices == stack.n_matrices &&
                squared.n_rows == stack.n_rows && squared.n_cols == stack.n_cols && squared.col_stride == 1,
            "scale must have the weight's shape and contiguous rows, and no root beside it");
    selection.scale = static_cast<const float*>(squared.data);
    selection.scale_matrix_stride = squared.matrix_stride;
    selection.scale_row_stride = squared.row_stride;
  }
  return selection;
}

// bits, values and offsets of a matrix, or of a stack as one matrix of all rows.
inline wanda::PackedRows packed_of(const Tensor& bits, const Tensor& values, const OptionalTensor& offsets,
                                   int64_t n_rows, int64_t n_cols) {
  require(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() && bits.numel() == n_rows * ((n_cols + 7) / 8),
          "bits must be contiguous uint8 for ", n_rows, " rows of ", n_cols, " columns");
  require(values.is_contiguous() && (offsets || n_rows == 0 || values.numel() % n_rows == 0),
          "values must be contiguous, with the same number in each row or with offsets");
  if (offsets) {
    const bool fits = offsets->scalar_type() == ScalarType::Long && offsets->is_contiguous();
    require(fits && offsets->numel() == n_rows + 1, "offsets must be contiguous int64 with ", n_rows + 1, " elements");
  }
  return {
      .bits = static_cast<const uint8_t*>(data_of(bits, "bits")),
      .values = data_of(values, "values"),
      .offsets = offsets ? static_cast<const int64_t*>(data_of(*offsets, "offsets")) : nullptr,
      .n_rows = n_rows,
      .n_cols = n_cols,
      .n_values = values.numel(),
      .row_values = offsets || n_rows == 0 ? 0 : values.numel() / n_rows,
  };
}

inline float* accumulator_of(const Tensor& acc, int64_t numel, const char* name = "acc") {
  require_floats(acc, name);
  require(acc.numel() == numel && acc.is_contiguous(), name, " must be contiguous with ", numel, " elements");
  return static_cast<float*>(data_of(acc, name));
}

#ifdef WANDA_CUDA

// The tensor's device, torch's current stream on it, and scratch from torch's allocator. The allocator may reuse freed
// scratch at once, but only for later work on the same stream.
class CallContext {
 public:
  explicit CallContext(const Tensor& tensor, size_t scratch_bytes = 0) : guard_(tensor.get_device_index()) {
    // torch's macro for checking the code has a different name in every version of its headers.
    const auto code = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &context_.stream);
    require(code == AOTI_TORCH_SUCCESS, "torch has no current stream on GPU ", tensor.get_device_index());
    if (scratch_bytes == 0) return;
    scratch_ = torch::stable::new_empty(tensor, {static_cast<int64_t>(scratch_bytes)}, ScalarType::Byte);
    context_.scratch = scratch_->data_ptr();
  }
  const wanda::Context& context() const { return context_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  wanda::Context context_ = {};
  OptionalTensor scratch_;
};

#else

class CallContext {
 public:
  explicit CallContext(const Tensor&) {
    context_.n_threads = static_cast<int>(torch::stable::get_num_threads());
    context_.parallel_for = [](int64_t begin, int64_t end, int64_t grain, wanda::ParallelBody body, void* closure) {
      torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, closure); });
    };
  }
  const wanda::Context& context() const { return context_; }

 private:
  wanda::Context context_ = {};
};

#endif

}  // namespace wanda::operands
