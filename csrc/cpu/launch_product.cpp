// Products over tokens on the CPU, where they are ours: which, and how they are cut among threads.
#include <algorithm>
#include <memory>

#include "launching.h"
#include "token_product.h"

namespace wanda {
namespace {

using cpu::TokenProduct;

constexpr int64_t kBandsOfThread = 4;
constexpr int64_t kMirrorTile = 16;  // a line of the cache

// Null: torch's products are better, or there are none of ours.
const TokenProduct* token_product(bool in_bf16, bool square) {
#if defined(__x86_64__)
  // MKL, torch's BLAS, takes its AVX2 path on AMD. That beats our AVX2, but not by as much as a square's half saves.
  static const bool amd = __builtin_cpu_is("amd"), brain = __builtin_cpu_supports("avx512bf16");
  const TokenProduct* found = nullptr;
  if (&kernels() == &cpu::kAvx512 && brain && in_bf16) found = &cpu::kBrainProductAvx512;
  if (&kernels() == &cpu::kAvx512 && brain && !in_bf16 && amd) found = &cpu::kProductAvx512;  // Zen 4 on has both
  if (&kernels() == &cpu::kAvx2 && !in_bf16 && amd && square) found = &cpu::kProductAvx2;
  return found && found->add_panels ? found : nullptr;
#else
  return nullptr;
#endif
}

// Some columns of an operand, packed; a panel's words lie together.
class Packed {
 public:
  Packed(const TokenProduct& product, int64_t n_tokens, int64_t n_panels)
      : n_units(product.units_of(n_tokens)),
        panel_words_(n_units * product.panel),
        words_(new uint32_t[n_panels * panel_words_]) {}
  uint32_t* panel(int64_t i) const { return words_.get() + i * panel_words_; }
  const int64_t n_units;

 private:
  const int64_t panel_words_;
  std::unique_ptr<uint32_t[]> words_;
};

Packed packed(const Context& context, const TokenProduct& product, const Matrix& x) {
  const int64_t n_panels = product.panels_of(x.n_cols);
  Packed columns(product, x.n_rows, n_panels);
  parallel_for(context, n_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) product.pack_panel(x, i, columns.panel(i));
  });
  return columns;
}

// Rows of acc are cut into bands of so many panels: few enough that every thread has some, of each size.
int64_t panels_of_band(const Context& context, const TokenProduct& product, int64_t n_rows) {
  const int64_t share = product.panels_of(n_rows) / (kBandsOfThread * std::max(1, context.n_threads));
  return std::clamp<int64_t>(share, 1, product.panels_at_once);
}

}  // namespace

bool adds_products(bool in_bf16) { return token_product(in_bf16, false) != nullptr; }
bool adds_squares(bool in_bf16) { return token_product(in_bf16, true) != nullptr; }

void add_product(const Context& context, const Matrix& a, const Matrix& b, bool in_bf16, const Matrix& acc) {
  const TokenProduct& product = *token_product(in_bf16, false);
  const Packed columns = packed(context, product, b);
  const int64_t band = panels_of_band(context, product, a.n_cols), n_panels = product.panels_of(a.n_cols);
  share_out(context, (n_panels + band - 1) / band, [&](Items& bands) {
    const Packed rows(product, a.n_rows, band);
    for (int64_t i; bands.take(i);) {
      const int64_t panel = i * band, first = panel * product.panel;
      const int64_t n_rows = std::min(band * product.panel, a.n_cols - first);
      for (int64_t j = 0; j < product.panels_of(n_rows); ++j) product.pack_panel(a, panel + j, rows.panel(j));
      product.add_panels(rows.panel(0), columns.panel(0), rows.n_units,
                         static_cast<float*>(acc.data) + first * acc.stride, acc.stride, n_rows, b.n_cols, false);
    }
  });
}

void add_square(const Context& context, const Matrix& x, bool in_bf16, const Matrix& acc) {
  const TokenProduct& product = *token_product(in_bf16, true);
  const Packed columns = packed(context, product, x);
  const int64_t band = panels_of_band(context, product, x.n_cols);
  const int64_t n_bands = (product.panels_of(x.n_cols) + band - 1) / band;
  share_out(context, n_bands, [&](Items& bands) {  // the longest rows first
    for (int64_t i; bands.take(i);) {
      const int64_t panel = band * i, first = panel * product.panel;
      product.add_panels(columns.panel(panel), columns.panel(panel), columns.n_units,
                         static_cast<float*>(acc.data) + first * (acc.stride + 1), acc.stride,
                         std::min(band * product.panel, x.n_cols - first), x.n_cols - first, true);
    }
  });
}

void mirror(const Context& context, const Matrix& acc) {
  float* const values = static_cast<float*>(acc.data);
  share_out(context, (acc.n_rows + kMirrorTile - 1) / kMirrorTile, [&](Items& bands) {
    for (int64_t i; bands.take(i);) {
      const int64_t first = i * kMirrorTile, end = std::min(first + kMirrorTile, acc.n_rows);
      for (int64_t begin = 0; begin <= first; begin += kMirrorTile) {  // rows above the band, or the band's own
        for (int64_t row = first; row < end; ++row) {
          const int64_t stop = std::min(begin + kMirrorTile, row);
          for (int64_t col = begin; col < stop; ++col) values[row * acc.stride + col] = values[col * acc.stride + row];
        }
      }
    }
  });
}

}  // namespace wanda
