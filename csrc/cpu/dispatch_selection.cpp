// Selections on the CPU whose rows are independent: ranges of rows go to the kernels of the instruction set in use.
// Selections over the whole matrix: prune_matrix.cpp, prune_variant.cpp.
#include "stack.h"

namespace wanda {

using cpu::Kernels;
using cpu::kernels;

void prune_rows(const Context& context, const StackSelection& s, int64_t num_pruned) {
  const Kernels& isa = kernels();
  for_selections(context, s, [&](const Selection& part, void* scratch) {
    isa.prune_rows(part, num_pruned, 0, part.weight.n_rows, scratch);
  });
}

void prune_nm(const Context& context, const StackSelection& s, int n, int m) {
  const Kernels& isa = kernels();
  for_selections(context, s, [&](const Selection& part, void* scratch) {
    isa.prune_nm(part, n, m, 0, part.weight.n_rows, scratch);
  });
}

void sparsegpt_block(const Context& context, const SparseGptBlock& block) {
  constexpr int64_t kGrainRows = 32;  // a row is much work: every error is subtracted from every later column
  const Kernels& isa = kernels();
  parallel_for(context, block.columns.weight.n_rows, kGrainRows, [&](int64_t begin, int64_t end) {
    isa.sparsegpt_block(block, begin, end);
  });
}

}  // namespace wanda
