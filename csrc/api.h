// What a device's library offers to ops.cpp and cpu_ops.cpp: whole operations on whole tensors. The CPU implements them
// in cpu/*.cpp, the GPU in cuda/*.cu.
#pragma once

#include <cstddef>

#include "kernel_arguments.h"

namespace wanda {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* closure);

// The resources of a call. operands.h fills in the members of its device.
struct Context {
  // CPU: torch's thread pool, since a second pool would compete with it.
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* closure);
  int n_threads;
  // GPU: torch's current stream, and device memory of *_scratch_bytes() that stays valid for the work on that stream.
  void* stream;
  void* scratch;
};

// CPU and GPU.

void add_sq_norm(const Context&, const Matrix& x, float* acc);
// acc has a row for each segment.
void add_sq_norm_segments(const Context&, const Matrix& x, const Segments&, const Matrix& acc);
void prune_rows(const Context&, const StackSelection&, int64_t num_pruned);
void prune_matrix(const Context&, const Selection&, int64_t rank);
void prune_variant(const Context&, const Selection&, double ratio, double* alpha);  // alpha is an output

// GPU only: bytes of scratch that an operation needs for these operands.

size_t sq_norm_scratch_bytes(const Matrix& x);
size_t sq_norm_segments_scratch_bytes(const Matrix& x, const Segments&);
size_t matrix_scratch_bytes();
size_t variant_scratch_bytes(const Matrix& weight);

// CPU only: selection.

void prune_nm(const Context&, const StackSelection&, int n, int m);
// pruned[row, col] = the score is at most the one at sorted position `rank` of the whole matrix.
void mark_lowest(const Context&, const Selection&, int64_t rank, uint8_t* pruned, int64_t pruned_stride);
void sparsegpt_block(const Context&, const SparseGptBlock&);

// CPU only: solvers.

int64_t admm_step(const Context&, const AdmmStep&);  // the number of elements of `pruned` that changed
void polish_step(const Context&, const PolishStep&);
void refine_groups(const Context&, const MaskBlock&);
void refine_swaps(const Context&, const MaskBlock&);

// CPU only: statistics and counts.

void activate(const Context&, const Matrix& x, Activation activation, int power, float* out);
void activate_gated(const Context&, const Matrix& gate, const Matrix& up, Activation activation, float* out);
bool all_finite(const Context&, const Stack& x, bool non_negative);
int64_t count_zeros(const Context&, const Stack& x);

// CPU only: products over tokens.

// Whether this machine has a kernel for a^T b over tokens that beats torch's BLAS, with operands rounded to bf16 or
// kept in fp32.
bool adds_products(bool in_bf16);
// The same for x^T x, of which torch computes both halves.
bool adds_squares(bool in_bf16);
// acc += a^T b. All are fp32; the operands are rounded to bf16 if `in_bf16`.
void add_product(const Context&, const Matrix& a, const Matrix& b, bool in_bf16, const Matrix& acc);
// acc += x^T x on and above the diagonal. Elements below it are unspecified afterwards.
void add_square(const Context&, const Matrix& x, bool in_bf16, const Matrix& acc);
// Copies the upper triangle of a square fp32 matrix to the lower one.
void mirror(const Context&, const Matrix& acc);

// CPU only: a block's forward.

void rms_norm(const Context&, const Matrix& x, const void* weight, float epsilon, const Matrix& out);
void gated_product(const Context&, const Matrix& gate, const Matrix& up, Activation activation, const Matrix& out);
void rotate(const Context&, const Rotation&);
// Whether this machine has a kernel for causal attention of that dtype and head_dim that is faster than torch's.
bool attends(DType dtype, int64_t head_dim);
void attend(const Context&, const Attention&);
// Whether this machine has a product with a weight of that dtype that is faster than torch's. sparse: the product skips
// the zeros of a pruned weight.
bool multiplies(DType dtype, bool sparse);
// Returns false, with `out` unfinished, if the weight has too few zeros for the compressed format.
bool linear(const Context&, const Linear&, bool sparse);


// CPU only: packed rows.

constexpr int64_t kPackedLinearRows = 8;  // the most rows of x

void packed_linear(const Context&, const PackedLinear&);
// out[n_rows, n_cols], contiguous, of element_bytes 1, 2, 4 or 8.
void unpack_rows(const Context&, const PackedRows&, int element_bytes, void* out);

}  // namespace wanda
