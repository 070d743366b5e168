// What each device's library offers to ops.cpp: whole operations on whole tensors. The CPU's stand in cpu/launch.cpp,
// the GPU's in cuda/*.cu.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace wanda {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* closure);

// What an operation needs from its surroundings; ops.cpp fills in the half of its device.
struct Context {
  // CPU: torch's own thread pool, for a second one would fight it.
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* closure);
  int n_threads;
  // GPU: torch's current stream, and device memory of scratch_bytes() that lives as long as the stream needs it.
  void* stream;
  void* scratch;
};

void add_sq_norm(const Context&, const Matrix& x, float* acc);
void prune_rows(const Context&, const Selection&, int64_t num_pruned);
void prune_nm(const Context&, const Selection&, int n, int m);
void prune_matrix(const Context&, const Selection&, int64_t rank);

// CPU alone.
double prune_variant(const Context&, const Selection&, double ratio);  // returns alpha
void mark_lowest(const Context&, const Selection&, int64_t rank, uint8_t* pruned, int64_t pruned_stride);
void prune_and_update(const Context&, const UpdateBlock&);
void activate(const Context&, const Matrix& x, Activation activation, int power, float* out);
void activate_gated(const Context&, const Matrix& gate, const Matrix& up, Activation activation, float* out);
void add_bf16_product(const Context&, const Matrix& a, const Matrix& b, float* acc);  // acc += a^T b; fp32 operands
bool all_finite(const Context&, const Matrix& x, bool non_negative);
// Whether this machine has a kernel for causal attention of that dtype and head_dim, and torch has no better one.
bool attends(DType dtype, int64_t head_dim);
void attend(const Context&, const Attention&);

// GPU alone: bytes of scratch for an operation on this operand.
size_t sq_norm_scratch_bytes(const Matrix& x);
size_t matrix_scratch_bytes();

}  // namespace wanda
