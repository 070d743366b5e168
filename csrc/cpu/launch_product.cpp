// Products over tokens on the CPU, where they are ours: which, and how they are cut among threads.
#include <algorithm>
#include <memory>

#include "launching.h"
#include "token_product.h"

namespace wanda {

bool adds_products(bool in_bf16) {
#if defined(__x86_64__)
  // MKL, torch's BLAS, takes its AVX2 path on AMD.
  static const bool brain = cpu::kTokenProductCompiled && __builtin_cpu_supports("avx512bf16");
  static const bool single = cpu::kTokenProductCompiled && __builtin_cpu_is("amd");
  return &kernels() == &cpu::kAvx512 && (in_bf16 ? brain : single);
#else
  return false;
#endif
}

#if defined(__x86_64__)
namespace {

using cpu::kPanel;

// All columns of an operand, packed; a panel's words lie together.
class Packed {
 public:
  Packed(const Context& context, const Matrix& x, bool in_bf16)
      : n_units(cpu::units_of(x.n_rows, in_bf16)),
        n_panels(cpu::panels_of(x.n_cols)),
        words_(new uint32_t[n_panels * n_units * kPanel]) {
    parallel_for(context, n_panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) cpu::pack_panel(x, i, in_bf16, words_.get() + i * n_units * kPanel);
    });
  }
  const uint32_t* panel(int64_t i) const { return words_.get() + i * n_units * kPanel; }
  const int64_t n_units, n_panels;

 private:
  std::unique_ptr<uint32_t[]> words_;
};

}  // namespace

void add_product(const Context& context, const Matrix& a, const Matrix& b, bool in_bf16, const Matrix& acc) {
  const Packed columns(context, b, in_bf16);
  parallel_for(context, cpu::panels_of(a.n_cols), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint32_t[]> rows(new uint32_t[columns.n_units * kPanel]);
    for (int64_t panel = begin; panel < end; ++panel) {
      cpu::pack_panel(a, panel, in_bf16, rows.get());
      const int64_t first = panel * kPanel;
      cpu::add_panel_product(rows.get(), columns.panel(0), columns.n_units, in_bf16,
                             static_cast<float*>(acc.data) + first * acc.stride, acc.stride,
                             std::min(kPanel, a.n_cols - first), b.n_cols);
    }
  });
}

void add_square(const Context& context, const Matrix& x, bool in_bf16, const Matrix& acc) {
  const Packed columns(context, x, in_bf16);
  parallel_for(context, columns.n_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {  // long rows and short ones in turn: every thread has its share of both
      const int64_t panel = i % 2 == 0 ? i / 2 : columns.n_panels - 1 - i / 2;
      const int64_t first = panel * kPanel;
      cpu::add_panel_product(columns.panel(panel), columns.panel(panel), columns.n_units, in_bf16,
                             static_cast<float*>(acc.data) + first * acc.stride + first, acc.stride,
                             std::min(kPanel, x.n_cols - first), x.n_cols - first);
    }
  });
}
#else
void add_product(const Context&, const Matrix&, const Matrix&, bool, const Matrix&) {}
void add_square(const Context&, const Matrix&, bool, const Matrix&) {}
#endif

}  // namespace wanda
