// Copies the upper triangle of a square matrix to the lower one, in square tiles: a column of a tile is one cache line.
#include <algorithm>

#include "parallel.h"

namespace wanda {

void mirror(const Context& context, const Matrix& acc) {
  constexpr int64_t kTile = 16;
  float* const values = static_cast<float*>(acc.data);
  share_out(context, (acc.n_rows + kTile - 1) / kTile, [&](Items& bands) {
    for (int64_t i; bands.take(i);) {
      const int64_t first = i * kTile, end = std::min(first + kTile, acc.n_rows);
      for (int64_t begin = 0; begin <= first; begin += kTile) {
        for (int64_t row = first; row < end; ++row) {
          const int64_t stop = std::min(begin + kTile, row);
          for (int64_t col = begin; col < stop; ++col) values[row * acc.stride + col] = values[col * acc.stride + row];
        }
      }
    }
  });
}

}  // namespace wanda
