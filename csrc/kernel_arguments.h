// The arguments of kernels: plain pointers and sizes. Only operands.h and the *ops.cpp files know torch.
#pragma once

#include <cstdint>

namespace wanda {

enum class DType : int { kFloat, kHalf, kBFloat };

// A score's key is the bit pattern of the fp32 value abs(W) * sqrt(scale). Keys order as integers as scores do. All
// NaNs share one key, the largest of any score.
constexpr int32_t kNaNKey = 0x7f800001;
constexpr int32_t kPaddingKey = 0x7fffffff;  // larger than every score's key, so padding is never pruned

// [n_rows, n_cols] with contiguous rows, `stride` elements apart.
struct Matrix {
  void* data;
  DType dtype;
  int64_t n_rows, n_cols, stride;
};

// Tokens sorted by expert: rows offsets[e] to offsets[e + 1] - 1 of a matrix are those of expert e.
struct Segments {
  const int64_t* offsets;  // [n + 1]; ascending within the matrix's rows, which on a GPU only the kernels can check
  int64_t n;
};

// [n_matrices, n_rows, n_cols] of any strides, in elements. One matrix is a stack of one.
struct Stack {
  void* data;
  DType dtype;
  int64_t n_matrices, n_rows, n_cols;
  int64_t matrix_stride, row_stride, col_stride;
};

// The operands of a selection. At most one of `root`, `scale` and `divisor` is given; without any, scores are
// magnitudes.
struct Selection {
  Matrix weight;
  const float* root;     // [n_cols]: the square root of the statistic
  const float* scale;    // [n_rows, n_cols]: the statistic itself; the kernel takes the root
  int64_t scale_stride;  // elements from row to row of `scale`
  uint8_t* mask;         // [n_rows, ceil(n_cols / 8)], contiguous, or null: bit 1 = kept, little-endian
  const float* divisor = nullptr;  // [n_cols]: the score is W^2 / divisor, as in SparseGPT; CPU only
};

// The operands of a selection in every matrix of a stack. At most one of `root` and `scale` is given.
struct StackSelection {
  Stack weight;
  const float* root;   // [n_matrices, n_cols], contiguous
  const float* scale;  // [n_matrices, n_rows, n_cols], columns contiguous
  int64_t scale_matrix_stride, scale_row_stride;
  uint8_t* mask;  // [n_matrices, n_rows, ceil(n_cols / 8)], contiguous, or null
};

// Memory of a matrix of any strides, in elements.
struct Elements {
  void* data;
  int64_t row_stride, col_stride;
};

// One block of columns in SparseGPT. `columns` holds the fp32 weights and how they are scored; its mask is not used.
struct SparseGptBlock {
  Selection columns;
  const float* u;         // [n_cols, n_cols], upper triangular
  int64_t u_stride;       // elements from row to row of `u`
  uint8_t* pruned;        // [n_rows, n_cols], 1 = pruned
  int64_t pruned_stride;  // bytes from row to row of `pruned`
  int n, m;               // the pattern that chooses `pruned`; m = 0: `pruned` is an input
  float* errors;          // [n_rows, n_cols], contiguous
};

// A step of ADMM. The matrices are contiguous fp32 [n_rows, n_cols].
struct AdmmStep {
  float *primal, *dual;
  const float* dense;
  uint8_t* pruned;  // 1 = pruned
  int64_t n_rows, n_cols;
  int64_t num_pruned;  // of each row, where m = 0
  int n, m;
  float ratio;
};

// A step of conjugate gradients. The matrices are contiguous fp32 [n_rows, n_cols].
struct PolishStep {
  float *z, *residual, *direction;
  const float* product;
  float* rho;                     // [n_rows]
  const float* inverse_diagonal;  // [n_cols]
  const uint8_t* pruned;          // 1 = pruned
  int64_t n_rows, n_cols;
};

// One block of columns in mask descent.
struct MaskBlock {
  Matrix w;               // fp32
  uint8_t* pruned;        // [n_rows, n_cols], 1 = pruned
  int64_t pruned_stride;  // bytes from row to row of `pruned`
  float* c;               // [n_rows, n_cols], contiguous
  const float* h;         // [n_cols, n_cols]
  int64_t h_stride;       // elements from row to row of `h`
  int n, m;               // refine_groups: groups keep n of m; refine_swaps: groups of m columns
};

// [batches, heads, tokens, head_dim] with contiguous rows; strides in elements.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

// fp32 or bf16. Each head of k and v serves n_heads / n_kv_heads consecutive heads of q.
struct Attention {
  Heads q, k, v, out;
  DType dtype;
  int64_t n_batches, n_heads, n_kv_heads, n_tokens, head_dim;
  float scale;
};

// Rotary embedding: out = x * cos + concat(-x's upper half, x's lower half) * sin, for every head of x. cos and sin are
// [batches, tokens, head_dim] with contiguous rows; strides in elements.
struct Rotation {
  Heads x, out;
  const void *cos, *sin;
  int64_t turn_batch, turn_token;  // strides of cos and sin
  DType dtype;                     // fp32 or bf16
  int64_t n_batches, n_heads, n_tokens, head_dim;
};

// out = x weight^T + bias; bias is null or [weight.n_rows]. All have one dtype, fp32 or bf16.
struct Linear {
  Matrix x, weight, out;
  const void* bias;
};

// Rows of which only some elements have a value; the others are zero. Bits, values and offsets are promised to fit each
// other. The kernels trust no promise with an address: they read nothing outside of the operands.
struct PackedRows {
  const uint8_t* bits;     // [n_rows, (n_cols + 7) / 8], contiguous: bit 1 = has a value, little-endian
  const void* values;      // [n_values], in the order of rows and columns
  const int64_t* offsets;  // [n_rows + 1]: where each row's values begin, and the last one's end; or null
  int64_t n_rows, n_cols, n_values;
  int64_t row_values;  // of each row, where offsets is null
};

// out = x weight^T + bias; bias is null or [weight.n_rows]. All have the dtype of x.
struct PackedLinear {
  Matrix x, out;
  PackedRows weight;
  const void* bias;
};

// The codes are those of ACTIVATION_CODES in native/ops.py.
enum class Activation : int { kNone, kSilu, kGelu, kGeluTanh, kRelu };

}  // namespace wanda
