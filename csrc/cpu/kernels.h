// The CPU kernels of one instruction set. Each processes a range of rows (or columns) on the calling thread.
#pragma once

#include <cstddef>

#include "../kernel_arguments.h"

namespace wanda::cpu {

constexpr int kMaxWidth = 16;         // lanes of the widest vector
constexpr int kMaxGroup = 32;         // the largest m of n:m
constexpr int kMaxBlock = 128;        // the most columns in a block of SparseGPT or mask descent
constexpr int kMaxCandidates = 70;    // masks of a group that refine_groups tries
constexpr int64_t kSlabTokens = 256;  // squares that are summed in fp32 before they are added to an fp64 sum
constexpr int kHighBits = 16;         // prune_matrix: bits of a key that the first histogram counts
constexpr int kLowBits = 15;          // prune_matrix: bits that the second histogram counts

// Bounds of a row's threshold in prune_variant: pruning up to `low` stays within the limit, up to `high` does not.
struct Bracket {
  int32_t low, high;
};

// The masks that keep n of m columns, as their pruned columns in lexicographic order.
struct Candidates {
  int count, n_pruned;
  uint8_t columns[kMaxCandidates][kMaxGroup];
  uint32_t masks[kMaxCandidates];  // bit i is set if column i is pruned
  uint8_t shared[kMaxCandidates];   // how many leading columns are those of the mask before
};

// Bounds on a block's Hessian, with which refine_swaps skips swaps that cannot be the best: for columns u and p of one
// group, abs(h_up) <= reach[u] * scale[p], up to rounding.
struct SwapBounds {
  const float *scale, *reach;  // [n_cols]
  float largest;               // of abs(h), reach and reach * scale
};

struct Kernels {
  const char* name;
  void (*prune_rows)(const Selection&, int64_t num_pruned, int64_t begin, int64_t end, void* scratch);
  void (*prune_nm)(const Selection&, int n, int m, int64_t begin, int64_t end, void* scratch);
  // high < 0: bins[key >> kLowBits] += 1 for every key. Otherwise bins[low bits] += 1 for keys whose high bits are
  // `high`.
  void (*count_keys)(const Selection&, int32_t high, uint32_t* bins, int64_t begin, int64_t end, void* scratch);
  // Prune every key <= thresholds[row * threshold_step].
  void (*prune_at_most)(const Selection&, const int32_t* thresholds, int64_t threshold_step, int64_t begin, int64_t end,
                        void* scratch);
  // pruned[row, col] = (key <= threshold), one byte each, rows `stride` bytes apart.
  void (*mark_at_most)(const Selection&, int32_t threshold, uint8_t* pruned, int64_t stride, int64_t begin, int64_t end,
                       void* scratch);
  // thresholds[row] = the largest key that the variant prunes at alpha, searched within brackets[row].
  // Returns the number of weights in these rows that this prunes.
  int64_t (*find_variant)(const Selection&, double alpha, const Bracket* brackets, int32_t* thresholds, int64_t begin,
                          int64_t end, void* scratch);
  void (*sparsegpt_block)(const SparseGptBlock&, int64_t begin, int64_t end);
  // Returns the number of elements of `pruned` that changed in these rows.
  int64_t (*admm_step)(const AdmmStep&, int64_t begin, int64_t end, void* scratch);
  void (*polish_step)(const PolishStep&, int64_t begin, int64_t end);
  void (*refine_groups)(const MaskBlock&, const Candidates&, int64_t begin, int64_t end);
  // Rows of `h` have room for kMaxWidth columns past the last one.
  void (*refine_swaps)(const MaskBlock&, const SwapBounds&, int64_t begin, int64_t end);
  void (*add_sq_norm)(const Matrix& x, float* acc, int64_t begin, int64_t end, void* scratch);
  // out[t, j] = abs(act(x[t, j]))^power, fp32, contiguous.
  void (*activate)(const Matrix& x, Activation activation, int power, float* out, int64_t begin, int64_t end);
  // out[t] = (up[t] * act'(gate[t]))^2, then act(gate[t])^2: fp32 [n_rows, 2 * n_cols], contiguous.
  void (*activate_gated)(const Matrix& gate, const Matrix& up, Activation activation, float* out, int64_t begin,
                         int64_t end);
  // Whether the rows hold no NaN, no infinity and, if `non_negative`, no negative number.
  bool (*all_finite)(const Matrix& x, bool non_negative, int64_t begin, int64_t end);
  int64_t (*count_zeros)(const Matrix& x, int64_t begin, int64_t end);
  // out = weight * x / sqrt(mean of x^2 + epsilon), per row; fp32 or bf16.
  void (*rms_norm)(const Matrix& x, const void* weight, float epsilon, const Matrix& out, int64_t begin, int64_t end);
  // out = act(gate) * up; fp32 or bf16.
  void (*gated_product)(const Matrix& gate, const Matrix& up, Activation activation, const Matrix& out, int64_t begin,
                        int64_t end);
  // Elements are of 32 bits if `is_wide`, else of 16.
  void (*copy_elements)(const Elements& from, const Elements& to, int64_t n_rows, int64_t n_cols, bool is_wide);
  // Tokens [begin, end), numbered through all batches.
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

// The kernels of the widest instruction set that this machine runs, or of the one that WANDA_KERNELS_CPU_ISA names. The
// variable is read on every call, so that a test can change it.
const Kernels& kernels();

}  // namespace wanda::cpu
