// What the kernels take: plain pointers and sizes. Nothing here knows torch, so that operands.h alone meets its ABI.
#pragma once

#include <cstdint>

namespace wanda {

enum class DType : int { kFloat, kHalf, kBFloat };

// A score's key: the bits of fp32 abs(W) * sqrt(scale), which order as integers. All NaNs are one, above infinity.
constexpr int32_t kNaNKey = 0x7f800001;
constexpr int32_t kPaddingKey = 0x7fffffff;  // above every score's key: padding is never pruned

// [n_rows, n_cols], rows contiguous, `stride` elements from row to row.
struct Matrix {
  void* data;
  DType dtype;
  int64_t n_rows, n_cols, stride;
};

// The operands of every selection. At most one of `root`, `scale` and `divisor` is given; none means plain magnitude.
struct Selection {
  Matrix weight;
  const float* root;     // [n_cols]: the square root of the statistic, already taken
  const float* scale;    // [n_rows, n_cols]: the statistic itself; the kernel takes the root
  int64_t scale_stride;  // elements from row to row of `scale`
  uint8_t* mask;         // [n_rows, ceil(n_cols / 8)], contiguous, or null: bit 1 = kept, little-endian
  const float* divisor = nullptr;  // [n_cols]: the score is W^2 / divisor, SparseGPT's; the CPU's alone
};

// A block of SparseGPT's: `columns` says how weights, fp32, are scored, and its mask is not used.
struct UpdateBlock {
  Selection columns;
  const float* u;         // [n_cols, n_cols], upper triangular
  int64_t u_stride;       // elements from row to row of `u`
  uint8_t* pruned;        // [n_rows, n_cols], 1 = pruned
  int64_t pruned_stride;  // bytes from row to row of `pruned`
  int n, m;               // what to choose `pruned` by; m = 0: it is given
  float* errors;          // [n_rows, n_cols], contiguous
};

// [batches, heads, tokens, head_dim] with contiguous rows; strides in elements.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

// Heads of q share those of k and v in equal runs. fp32 or bf16.
struct Attention {
  Heads q, k, v, out;
  DType dtype;
  int64_t n_batches, n_heads, n_kv_heads, n_tokens, head_dim;
  float scale;
};

// Rotary embedding: out = x * cos + (-x's upper half, x's lower half) * sin, for every head of x. cos and sin are
// [batches, tokens, head_dim] with contiguous rows, strides in elements.
struct Rotation {
  Heads x, out;
  const void *cos, *sin;
  int64_t turn_batch, turn_token;
  DType dtype;  // fp32 or bf16
  int64_t n_batches, n_heads, n_tokens, head_dim;
};

// out = x weight^T + bias; bias null or [weight.n_rows] of the same dtype, fp32 or bf16.
struct Linear {
  Matrix x, weight, out;
  const void* bias;
};

enum class Activation : int { kNone, kSilu, kGelu, kGeluTanh, kRelu };

}  // namespace wanda
