// prune_variant on the CPU: bisects alpha until the matrix has the wanted sparsity, with the same steps as the
// reference. For each alpha, prune_variant.h finds every row's threshold. A row's threshold grows with alpha, so the
// thresholds of earlier alphas bracket the later ones.
#include <atomic>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace wanda {
namespace {

using cpu::Bracket;
using cpu::Kernels;
using cpu::kernels;

// Every row's threshold at alpha. Returns the number of weights that these prune.
int64_t find_variant(const Context& context, const Selection& s, double alpha, const std::vector<Bracket>& brackets,
                     std::vector<int32_t>& thresholds) {
  const Kernels& isa = kernels();
  std::atomic<int64_t> n_pruned{0};
  for_rows_with_scratch(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    n_pruned += isa.find_variant(s, alpha, brackets.data(), thresholds.data(), begin, end, scratch);
  });
  return n_pruned;
}

}  // namespace

void prune_variant(const Context& context, const Selection& s, double ratio, double* settled_alpha) {
  const double numel = static_cast<double>(s.weight.n_rows * s.weight.n_cols);
  std::vector<Bracket> brackets(s.weight.n_rows, Bracket{-1, kNaNKey + 1});
  std::vector<int32_t> thresholds(s.weight.n_rows);
  double low = 0, alpha = 0.4, high = 0.8;
  double sparsity = find_variant(context, s, alpha, brackets, thresholds) / numel;
  while (std::abs(sparsity - ratio) > 0.001 && high - low >= 0.001) {
    const bool too_sparse = sparsity > ratio;
    (too_sparse ? high : low) = alpha;
    for (size_t row = 0; row < brackets.size(); ++row) {
      (too_sparse ? brackets[row].high : brackets[row].low) = thresholds[row] + (too_sparse ? 1 : 0);
    }
    alpha = (low + high) / 2;
    sparsity = find_variant(context, s, alpha, brackets, thresholds) / numel;
  }
  const Kernels& isa = kernels();
  for_rows_with_scratch(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    isa.prune_at_most(s, thresholds.data(), 1, begin, end, scratch);
  });
  *settled_alpha = alpha;
}

}  // namespace wanda
