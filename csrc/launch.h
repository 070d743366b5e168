// What each device's library offers to *ops.cpp: whole operations on whole tensors. The CPU's stand in cpu/launch.cpp,
// the GPU's in cuda/*.cu.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace wanda {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* closure);

// What an operation needs from its surroundings; operands.h fills in the half of its device.
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
void prune_variant(const Context&, const Selection&, double ratio, double* alpha);  // alpha: written

// CPU alone.
void mark_lowest(const Context&, const Selection&, int64_t rank, uint8_t* pruned, int64_t pruned_stride);
void prune_and_update(const Context&, const UpdateBlock&);
void activate(const Context&, const Matrix& x, Activation activation, int power, float* out);
void activate_gated(const Context&, const Matrix& gate, const Matrix& up, Activation activation, float* out);
// Whether this machine sums products over tokens itself: of bf16 pairs, or of fp32 where that beats torch's BLAS.
bool adds_products(bool in_bf16);
bool adds_squares(bool in_bf16);  // the same for x^T x, of which torch sums more than half
// acc += a^T b of fp32 operands, rounded to bf16 where asked; all three fp32.
void add_product(const Context&, const Matrix& a, const Matrix& b, bool in_bf16, const Matrix& acc);
// acc += x^T x on and above the diagonal; some of what is below changes too.
void add_square(const Context&, const Matrix& x, bool in_bf16, const Matrix& acc);
// What is above the diagonal of a square fp32 matrix, below it too.
void mirror(const Context&, const Matrix& acc);
bool all_finite(const Context&, const Matrix& x, bool non_negative);
int64_t count_zeros(const Context&, const Matrix& x);
void rms_norm(const Context&, const Matrix& x, const void* weight, float epsilon, const Matrix& out);
void gated_product(const Context&, const Matrix& gate, const Matrix& up, Activation activation, const Matrix& out);
void rotate(const Context&, const Rotation&);
// Whether this machine has a kernel for causal attention of that dtype and head_dim, and torch has no better one.
bool attends(DType dtype, int64_t head_dim);
void attend(const Context&, const Attention&);
// Whether this machine has a product with a weight of that dtype that is faster than torch's: with a pruned one, without
// the products of its zeros, or with any.
bool multiplies(DType dtype, bool sparse);
// False, and `out` is unfinished: the weight holds more than the format for pruned ones does.
bool linear(const Context&, const Linear&, bool sparse);

// GPU alone: bytes of scratch for an operation on this operand.
size_t sq_norm_scratch_bytes(const Matrix& x);
size_t matrix_scratch_bytes();
size_t variant_scratch_bytes(const Matrix& weight);

}  // namespace wanda
