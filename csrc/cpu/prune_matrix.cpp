// prune_matrix and mark_lowest on the CPU. Both prune up to the exact order statistic of the whole matrix, found
// without a sort:
//   1. A histogram of the high 16 bits of every key tells which of them the key at sorted position `rank` has.
//   2. A histogram of the low 15 bits of the keys with those high bits tells the rest.
//   3. A last pass prunes, or marks, every key up to it.
#include <algorithm>
#include <vector>

#include "parallel.h"

namespace wanda {
namespace {

using cpu::Kernels;
using cpu::kernels;

// One histogram of the whole matrix. Each part of the rows has bins of its own, which are added at the end.
std::vector<int64_t> histogram(const Context& context, const Selection& s, int32_t high, int n_bins) {
  const int64_t numel = s.weight.n_rows * s.weight.n_cols;
  const int64_t n_parts = std::clamp<int64_t>(numel / kGrainElements, 1, std::max(1, context.n_threads));
  const Kernels& isa = kernels();
  std::vector<std::vector<uint32_t>> bins(n_parts);
  parallel_for(context, n_parts, 1, [&](int64_t first, int64_t last) {
    const ScratchMemory scratch(s.weight.n_cols);
    for (int64_t part = first; part < last; ++part) {
      bins[part].assign(n_bins, 0);
      const int64_t begin = s.weight.n_rows * part / n_parts, end = s.weight.n_rows * (part + 1) / n_parts;
      isa.count_keys(s, high, bins[part].data(), begin, end, scratch.get());
    }
  });
  std::vector<int64_t> total(n_bins, 0);
  for (const auto& part : bins) {
    for (int bin = 0; bin < n_bins; ++bin) total[bin] += part[bin];
  }
  return total;
}

// The bin that holds sorted position `rank`. `rank` becomes the position within that bin.
int32_t find_bin(const std::vector<int64_t>& bins, int64_t& rank) {
  int32_t bin = 0;
  for (; rank >= bins[bin]; ++bin) rank -= bins[bin];
  return bin;
}

// The key at sorted position `rank` of the whole matrix; -1 if that is NaN, since no score is <= NaN.
int32_t find_threshold(const Context& context, const Selection& s, int64_t rank) {
  const int32_t high = find_bin(histogram(context, s, -1, 1 << cpu::kHighBits), rank);
  const int32_t low = find_bin(histogram(context, s, high, 1 << cpu::kLowBits), rank);
  const int32_t key = high << cpu::kLowBits | low;
  return key == kNaNKey ? -1 : key;
}

}  // namespace

void prune_matrix(const Context& context, const Selection& s, int64_t rank) {
  const int32_t threshold = find_threshold(context, s, rank);
  const Kernels& isa = kernels();
  for_rows_with_scratch(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    isa.prune_at_most(s, &threshold, 0, begin, end, scratch);
  });
}

void mark_lowest(const Context& context, const Selection& s, int64_t rank, uint8_t* pruned, int64_t pruned_stride) {
  const int32_t threshold = find_threshold(context, s, rank);
  const Kernels& isa = kernels();
  for_rows_with_scratch(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    isa.mark_at_most(s, threshold, pruned, pruned_stride, begin, end, scratch);
  });
}

}  // namespace wanda
