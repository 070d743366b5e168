// The CPU kernels of one instruction set: each does a range of rows (or columns) on the calling thread.
#pragma once

#include <cstddef>

#include "../kernels.h"

namespace wanda::cpu {

constexpr int kMaxWidth = 16;         // lanes of the widest vector
constexpr int kMaxGroup = 32;         // the largest m of n:m
constexpr int kMaxBlock = 128;        // the most columns of a block of SparseGPT's
constexpr int64_t kSlabTokens = 256;  // fp32 sums of at most this many squares are added up in fp64
constexpr int kHighBits = 16;         // prune_matrix: bits of a key that the first histogram counts
constexpr int kLowBits = 15;          // and the second

// A row's bracket of the threshold in prune_variant: `low` prunes within the limit, `high` does not.
struct Bracket {
  int32_t low, high;
};

struct Kernels {
  const char* name;
  void (*prune_rows)(const Selection&, int64_t num_pruned, int64_t begin, int64_t end, void* scratch);
  void (*prune_nm)(const Selection&, int n, int m, int64_t begin, int64_t end, void* scratch);
  // bins[key >> kLowBits] += 1, or with high >= 0, bins[low bits] += 1 for the keys whose high bits are `high`.
  void (*count_keys)(const Selection&, int32_t high, uint32_t* bins, int64_t begin, int64_t end, void* scratch);
  // Prune every key <= thresholds[row * threshold_step]. Returns how many.
  int64_t (*prune_at_most)(const Selection&, const int32_t* thresholds, int64_t threshold_step, int64_t begin,
                           int64_t end, void* scratch);
  // pruned[row, col] = the key is <= threshold, a byte each, rows `stride` bytes apart.
  void (*mark_at_most)(const Selection&, int32_t threshold, uint8_t* pruned, int64_t stride, int64_t begin, int64_t end,
                       void* scratch);
  void (*prune_and_update)(const UpdateBlock&, int64_t begin, int64_t end);
  // thresholds[row]: the largest key that the variant prunes at alpha, sought inside brackets[row].
  // Returns how many weights of these rows that prunes.
  int64_t (*find_variant)(const Selection&, double alpha, const Bracket* brackets, int32_t* thresholds,
                          int64_t begin, int64_t end, void* scratch);
  void (*add_sq_norm)(const Matrix& x, float* acc, int64_t begin, int64_t end, void* scratch);
  // out[t, j] = abs(act(x[t, j]))^power, fp32, contiguous, for rows [begin, end).
  void (*activate)(const Matrix& x, Activation activation, int power, float* out, int64_t begin, int64_t end);
  // out[t] = (up[t] * act'(gate[t]))^2, then act(gate[t])^2: fp32 [n_rows, 2 * n_cols], contiguous.
  void (*activate_gated)(const Matrix& gate, const Matrix& up, Activation activation, float* out, int64_t begin,
                         int64_t end);
  // Whether rows [begin, end) are free of NaN and infinity (and of negative numbers).
  bool (*all_finite)(const Matrix& x, bool non_negative, int64_t begin, int64_t end);
  int64_t (*count_zeros)(const Matrix& x, int64_t begin, int64_t end);
  // Rows [begin, end) of fp32 or bf16: x / root of its mean square * weight; act(gate) * up.
  void (*rms_norm)(const Matrix& x, const void* weight, float epsilon, const Matrix& out, int64_t begin, int64_t end);
  void (*gated_product)(const Matrix& gate, const Matrix& up, Activation activation, const Matrix& out, int64_t begin,
                        int64_t end);
  // Tokens [begin, end) of all batches, counted through.
  void (*rotate)(const Rotation&, int64_t begin, int64_t end);
};

// Bytes of scratch that a kernel of any instruction set may use for rows of n_cols.
constexpr size_t scratch_bytes(int64_t n_cols) {
  return static_cast<size_t>(n_cols + kMaxWidth * kMaxGroup) * (4 + 8) + static_cast<size_t>(n_cols) / 8 + 256;
}

#if defined(__x86_64__)
extern const Kernels kAvx512;
extern const Kernels kAvx2;
#endif
extern const Kernels kPortable;

}  // namespace wanda::cpu
