// A step of conjugate gradients for each row, which stays in L1 or L2 for its three passes: the sum that gives the step's
// length, the step itself with the new residual's sum, and the next direction.
#pragma once

#include "column_tile.h"

namespace WANDA_ISA {

using wanda::PolishStep;

constexpr int kSums = 4;  // partial sums, which hide the latency of an addition

// The sum of term(col) over a row, where each term is multiplied and added: term returns a sum with kWidth products.
template <typename AddTerm>
float sum_of_row(int64_t n_cols, const AddTerm& add_term) {
  Simd::Float sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Simd::broadcast(0.0f);
  int64_t col = 0;
  for (; col + kSums * kWidth <= n_cols; col += kSums * kWidth) {
    for (int i = 0; i < kSums; ++i) sums[i] = add_term(sums[i], col + i * kWidth);
  }
  for (; col < n_cols; col += kWidth) sums[0] = add_term(sums[0], col);
  return Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
}

inline void polish_row(const PolishStep& s, int64_t row) {
  const int64_t n_cols = s.n_cols, begin = row * n_cols;
  float *const z = s.z + begin, *const residual = s.residual + begin, *const direction = s.direction + begin;
  const float* const product = s.product + begin;
  const uint8_t* const pruned = s.pruned + begin;
  const float rho = s.rho[row];

  const float curvature = sum_of_row(n_cols, [&](Simd::Float sum, int64_t col) {
    return Simd::multiply_add(load_part(direction + col, n_cols - col), load_part(product + col, n_cols - col), sum);
  });
  const Simd::Float step = Simd::broadcast(curvature > 0 ? rho / curvature : 0.0f);

  const float new_rho = sum_of_row(n_cols, [&](Simd::Float sum, int64_t col) {
    const int64_t left = n_cols - col;
    const auto gone = Simd::less(Simd::broadcast(0), Simd::bits(load_part(pruned + col, left)));
    const Simd::Float d = load_part(direction + col, left);
    store_part(z + col, Simd::multiply_add(step, d, load_part(z + col, left)), left);
    const Simd::Float moved = Simd::subtract_product(load_part(residual + col, left), step, load_part(product + col, left));
    const Simd::Float r = Simd::zero_if(gone, moved);
    store_part(residual + col, r, left);
    return Simd::multiply_add(r, Simd::multiply(r, load_part(s.inverse_diagonal + col, left)), sum);
  });
  const Simd::Float share = Simd::broadcast(rho > 0 ? new_rho / rho : 0.0f);

  for (int64_t col = 0; col < n_cols; col += kWidth) {
    const int64_t left = n_cols - col;
    const Simd::Float preconditioned =
        Simd::multiply(load_part(residual + col, left), load_part(s.inverse_diagonal + col, left));
    store_part(direction + col, Simd::multiply_add(share, load_part(direction + col, left), preconditioned), left);
  }
  s.rho[row] = new_rho;
}

inline void polish_step(const PolishStep& s, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) polish_row(s, row);
}

}  // namespace WANDA_ISA
