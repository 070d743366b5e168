// Statistics and counts on the CPU: ranges of rows or columns go to the kernels of the instruction set in use.
#include <algorithm>
#include <atomic>

#include "stack.h"

namespace wanda {

using cpu::Kernels;
using cpu::kernels;

// Each thread sums a range of columns, so that the order of a sum does not depend on the number of threads.
void add_sq_norm(const Context& context, const Matrix& x, float* acc) {
  constexpr int64_t kColumnBlock = 64;        // ranges begin at multiples of this: whole cache lines
  constexpr int64_t kMinStreamColumns = 256;  // the shortest range: the prefetcher follows a row's piece
  const int64_t n_blocks = (x.n_cols + kColumnBlock - 1) / kColumnBlock;
  const int64_t worthwhile = kGrainElements / (x.n_rows * kColumnBlock) + 1;
  const int64_t grain = std::max(kMinStreamColumns / kColumnBlock, worthwhile);
  const Kernels& isa = kernels();
  parallel_for(context, n_blocks, grain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumnBlock, end = std::min(x.n_cols, last * kColumnBlock);
    const ScratchMemory scratch(end - begin);
    isa.add_sq_norm(x, acc, begin, end, scratch.get());
  });
}

void activate(const Context& context, const Matrix& x, Activation activation, int power, float* out) {
  const Kernels& isa = kernels();
  for_rows(context, x, [&](int64_t begin, int64_t end) { isa.activate(x, activation, power, out, begin, end); });
}

void activate_gated(const Context& context, const Matrix& gate, const Matrix& up, Activation activation, float* out) {
  const Kernels& isa = kernels();
  for_rows(context, gate,
           [&](int64_t begin, int64_t end) { isa.activate_gated(gate, up, activation, out, begin, end); });
}

bool all_finite(const Context& context, const Stack& x, bool non_negative) {
  std::atomic<bool> finite{true};
  const Kernels& isa = kernels();
  for_pieces<false>(context, x, [&](const Piece& piece, void*) {
    if (!isa.all_finite(piece.rows, non_negative, 0, piece.rows.n_rows)) finite = false;
  });
  return finite;
}

int64_t count_zeros(const Context& context, const Stack& x) {
  std::atomic<int64_t> n_zeros{0};
  const Kernels& isa = kernels();
  for_pieces<false>(context, x, [&](const Piece& piece, void*) {
    n_zeros += isa.count_zeros(piece.rows, 0, piece.rows.n_rows);
  });
  return n_zeros;
}

}  // namespace wanda
