// Statistics and counts on the CPU: ranges of rows or columns go to the kernels of the instruction set in use.
#include <algorithm>
#include <atomic>
#include <vector>

#include "stack.h"

namespace wanda {

using cpu::Kernels;
using cpu::kernels;

namespace {

constexpr int64_t kColumnBlock = 64;        // ranges of columns begin at multiples of this: whole cache lines
constexpr int64_t kMinStreamColumns = 256;  // the shortest range: the prefetcher follows a row's piece
constexpr int64_t kPiecesPerThread = 4;

// Columns [begin, end) of the sums of experts [first, last).
struct Share {
  int64_t first, last, begin, end;
};

// Work of about equal size: several experts with few tokens, or a range of columns of one with many. A column's sum is
// the same in any range.
std::vector<Share> pieces_of(const Context& context, const Matrix& x, const Segments& s) {
  const auto elements = [&](int64_t e) { return (s.offsets[e + 1] - s.offsets[e]) * x.n_cols; };
  const int64_t all = (s.offsets[s.n] - s.offsets[0]) * x.n_cols;
  const int64_t n_pieces = context.n_threads == 1 ? 1 : kPiecesPerThread * context.n_threads;
  const int64_t grain = std::max(kGrainElements, all / n_pieces);
  std::vector<Share> pieces;
  for (int64_t first = 0, last; first < s.n; first = last) {
    int64_t work = elements(first);
    for (last = first + 1; last < s.n && work + elements(last) <= grain; ++last) work += elements(last);
    const int64_t most = std::clamp<int64_t>(x.n_cols / kMinStreamColumns, 1, context.n_threads);
    const int64_t n_ranges = std::clamp<int64_t>(work / grain, 1, most);
    const int64_t n_blocks = (x.n_cols + kColumnBlock - 1) / kColumnBlock;
    const int64_t width = (n_blocks + n_ranges - 1) / n_ranges * kColumnBlock;
    for (int64_t begin = 0; begin < x.n_cols; begin += width) {
      pieces.push_back({first, last, begin, std::min(begin + width, x.n_cols)});
    }
  }
  return pieces;
}

Matrix rows_of(const Matrix& x, int64_t first, int64_t n_rows) {
  Matrix rows = x;
  rows.data = static_cast<char*>(x.data) + first * x.stride * (x.dtype == DType::kFloat ? 4 : 2);
  rows.n_rows = n_rows;
  return rows;
}

}  // namespace

// Each thread sums a range of columns, so that the order of a sum does not depend on the number of threads.
void add_sq_norm(const Context& context, const Matrix& x, float* acc) {
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

void add_sq_norm_segments(const Context& context, const Matrix& x, const Segments& s, const Matrix& acc) {
  const Kernels& isa = kernels();
  const std::vector<Share> pieces = pieces_of(context, x, s);
  share_out(context, static_cast<int64_t>(pieces.size()), [&](Items& items) {
    const ScratchMemory scratch(x.n_cols);
    for (int64_t i; items.take(i);) {
      const Share& piece = pieces[i];
      for (int64_t e = piece.first; e < piece.last; ++e) {
        const int64_t n_tokens = s.offsets[e + 1] - s.offsets[e];
        if (n_tokens == 0) continue;
        const Matrix tokens = rows_of(x, s.offsets[e], n_tokens);
        isa.add_sq_norm(tokens, static_cast<float*>(acc.data) + e * acc.stride, piece.begin, piece.end, scratch.get());
      }
    }
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
