// How an operation spreads over the rows of a stack of matrices: one parallel region for all of them, and rows with
// contiguous columns for the kernels.
//
// Columns that lie apart, as in transposed storage, are gathered a tile of rows at a time and scattered back: no copy
// of the whole parameter. The rows of a tile share the cache lines of each column.
#pragma once

#include "parallel.h"

namespace wanda {

constexpr int64_t kTileBytes = 64;  // a tile's part of a column, if rows are neighbours: a cache line

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// Some rows of one matrix. `rows` begins at row `first` of matrix `index`.
struct Piece {
  Matrix rows;
  int64_t index, first;
};

// The memory of one row, from the first column on.
inline char* row_at(const Stack& stack, int64_t index, int64_t row) {
  const int64_t offset = index * stack.matrix_stride + row * stack.row_stride;
  return static_cast<char*>(stack.data) + offset * size_of(stack.dtype);
}

// body(piece) with rows gathered into `tile`. They are written back if kWrites.
template <bool kWrites, typename Body>
void with_tile(const cpu::Kernels& isa, const Stack& stack, const Piece& piece, void* tile, const Body& body) {
  const int64_t n_rows = piece.rows.n_rows, n_cols = stack.n_cols;
  const Elements stored = {piece.rows.data, stack.row_stride, stack.col_stride}, gathered = {tile, n_cols, 1};
  const bool is_wide = stack.dtype == DType::kFloat;
  isa.copy_elements(stored, gathered, n_rows, n_cols, is_wide);
  body(Piece{{tile, stack.dtype, n_rows, n_cols, n_cols}, piece.index, piece.first});
  if (kWrites) isa.copy_elements(gathered, stored, n_rows, n_cols, is_wide);
}

// body(piece, scratch) over all rows of a stack.
template <bool kWrites, typename Body>
void for_pieces(const Context& context, const Stack& stack, const Body& body) {
  const cpu::Kernels& isa = cpu::kernels();
  const bool in_place = stack.col_stride == 1;
  const int64_t size = size_of(stack.dtype), n_tile_rows = kTileBytes / size;
  const int64_t most_rows = in_place ? stack.n_rows : n_tile_rows;
  parallel_for(context, stack.n_matrices * stack.n_rows, row_grain(stack.n_cols), [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(stack.n_cols);
    const ScratchMemory tile(static_cast<size_t>(in_place ? 0 : n_tile_rows * stack.n_cols * size));
    for (int64_t row = begin, n_rows; row < end; row += n_rows) {
      const int64_t index = row / stack.n_rows, first = row % stack.n_rows;
      n_rows = std::min({end - row, stack.n_rows - first, most_rows});
      const Matrix rows = {row_at(stack, index, first), stack.dtype, n_rows, stack.n_cols, stack.row_stride};
      const Piece piece = {rows, index, first};
      if (in_place) {
        body(piece, scratch.get());
      } else {
        with_tile<kWrites>(isa, stack, piece, tile.get(), [&](const Piece& copy) { body(copy, scratch.get()); });
      }
    }
  });
}

// body(selection, scratch) over all rows of a stack, with a selection in each piece of them.
template <typename Body>
void for_selections(const Context& context, const StackSelection& s, const Body& body) {
  const int64_t n_rows = s.weight.n_rows, n_cols = s.weight.n_cols;
  for_pieces<true>(context, s.weight, [&](const Piece& piece, void* scratch) {
    Selection part = {.weight = piece.rows, .root = nullptr, .scale = nullptr, .scale_stride = s.scale_row_stride,
                      .mask = nullptr};
    if (s.root != nullptr) part.root = s.root + piece.index * n_cols;
    if (s.scale != nullptr) {
      part.scale = s.scale + piece.index * s.scale_matrix_stride + piece.first * s.scale_row_stride;
    }
    if (s.mask != nullptr) part.mask = s.mask + (piece.index * n_rows + piece.first) * ((n_cols + 7) / 8);
    body(part, scratch);
  });
}

}  // namespace wanda
