// The solvers on the CPU: ranges of rows go to the kernels of the instruction set in use.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace wanda {
namespace {

using cpu::Kernels;
using cpu::kernels;
using cpu::kMaxWidth;

cpu::Candidates candidates_of(int n, int m) {
  cpu::Candidates all = {};
  all.n_pruned = m - n;
  std::vector<uint8_t> columns(all.n_pruned);
  for (int i = 0; i < all.n_pruned; ++i) columns[i] = static_cast<uint8_t>(i);
  for (int changed = 0; changed >= 0;) {
    std::copy(columns.begin(), columns.end(), all.columns[all.count]);
    for (uint8_t column : columns) all.masks[all.count] |= 1u << column;
    all.shared[all.count++] = static_cast<uint8_t>(changed);
    // The last column that can move to the right does, and those behind it follow directly.
    changed = all.n_pruned - 1;
    while (changed >= 0 && columns[changed] == n + changed) --changed;
    if (changed < 0) break;
    ++columns[changed];
    for (int i = changed + 1; i < all.n_pruned; ++i) columns[i] = static_cast<uint8_t>(columns[i - 1] + 1);
  }
  return all;
}

// A block's Hessian with padded rows, and its bounds.
class SwapHessian {
 public:
  explicit SwapHessian(const MaskBlock& block)
      : stride(block.w.n_cols + kMaxWidth), h_(block.w.n_cols * stride), scale_(block.w.n_cols), reach_(block.w.n_cols) {
    const int64_t width = block.w.n_cols;
    for (int64_t i = 0; i < width; ++i) {
      std::copy_n(block.h + i * block.h_stride, width, &h_[i * stride]);
      // The products of scales stay far from the subnormal numbers. Any positive scale gives a bound.
      const float diagonal = h_[i * (stride + 1)];
      scale_[i] = diagonal > 1e-20f ? std::sqrt(diagonal) : 1.0f;
    }
    for (int64_t first = 0; first < width; first += block.m) {
      add_group(first, std::min<int64_t>(first + block.m, width));
    }
    const float scale = *std::max_element(scale_.begin(), scale_.end());
    const float reach = *std::max_element(reach_.begin(), reach_.end());
    largest_ = std::max(largest_, reach * std::max(scale, 1.0f));
  }
  const float* h() const { return h_.data(); }
  cpu::SwapBounds bounds() const { return {scale_.data(), reach_.data(), largest_}; }
  const int64_t stride;

 private:
  void add_group(int64_t first, int64_t end) {
    for (int64_t u = first; u < end; ++u) {
      for (int64_t p = first; p < end; ++p) {
        const float size = std::fabs(h_[u * stride + p]);
        if (p != u) reach_[u] = std::max(reach_[u], size / scale_[p]);
        largest_ = std::max(largest_, size);
      }
    }
  }

  std::vector<float> h_, scale_, reach_;
  float largest_ = 0;
};

}  // namespace

int64_t admm_step(const Context& context, const AdmmStep& step) {
  const Kernels& isa = kernels();
  std::atomic<int64_t> changed = 0;
  parallel_for(context, step.n_rows, row_grain(step.n_cols), [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(step.n_cols);
    changed += isa.admm_step(step, begin, end, scratch.get());
  });
  return changed;
}

void polish_step(const Context& context, const PolishStep& step) {
  const Kernels& isa = kernels();
  parallel_for(context, step.n_rows, row_grain(step.n_cols),
               [&](int64_t begin, int64_t end) { isa.polish_step(step, begin, end); });
}

// Rows differ in their work, so they are handed out a few at a time.
template <typename Body>
void share_out_rows(const Context& context, int64_t n_rows, const Body& body) {
  constexpr int64_t kRows = 2 * kMaxWidth;
  share_out(context, (n_rows + kRows - 1) / kRows, [&](Items& parts) {
    for (int64_t i; parts.take(i);) body(i * kRows, std::min(n_rows, (i + 1) * kRows));
  });
}

void refine_groups(const Context& context, const MaskBlock& block) {
  const Kernels& isa = kernels();
  const cpu::Candidates candidates = candidates_of(block.n, block.m);
  share_out_rows(context, block.w.n_rows,
                 [&](int64_t begin, int64_t end) { isa.refine_groups(block, candidates, begin, end); });
}

void refine_swaps(const Context& context, const MaskBlock& block) {
  const Kernels& isa = kernels();
  const SwapHessian hessian(block);
  MaskBlock padded = block;
  padded.h = hessian.h();
  padded.h_stride = hessian.stride;
  share_out_rows(context, block.w.n_rows,
                 [&](int64_t begin, int64_t end) { isa.refine_swaps(padded, hessian.bounds(), begin, end); });
}

}  // namespace wanda
