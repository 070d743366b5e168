// Products over tokens on the CPU: chooses the kernels, packs the operands and shares the rows of the sum among
// threads.
#include <algorithm>
#include <exception>
#include <memory>

#include "parallel.h"
#include "token_product.h"

namespace wanda {
namespace {

using cpu::kernels;
using cpu::TokenProduct;

constexpr int64_t kBandsPerThread = 4;

// Null if torch's product is faster here, or if this instruction set has no kernel.
const TokenProduct* token_product(bool in_bf16, bool square) {
#if defined(__x86_64__)
  // torch's BLAS is MKL, which uses its AVX2 code on AMD. That is faster than our AVX2 kernel, and slower than ours on
  // a square, where ours computes only half.
  static const bool amd = __builtin_cpu_is("amd"), bf16 = __builtin_cpu_supports("avx512bf16");
  const TokenProduct* found = nullptr;
  if (&kernels() == &cpu::kAvx512 && bf16 && in_bf16) found = &cpu::kBf16ProductAvx512;
  if (&kernels() == &cpu::kAvx512 && bf16 && !in_bf16 && amd) found = &cpu::kFp32ProductAvx512;  // Zen 4 and later
  if (&kernels() == &cpu::kAvx2 && !in_bf16 && amd && square) found = &cpu::kFp32ProductAvx2;
  return found && found->add_panels ? found : nullptr;
#else
  return nullptr;
#endif
}

// Packed columns of an operand. The words of a panel are contiguous.
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

// The panels in a band of rows of acc. Every thread gets several bands, so that the last ones finish together.
int64_t panels_of_band(const Context& context, const TokenProduct& product, int64_t n_rows) {
  const int64_t share = product.panels_of(n_rows) / (kBandsPerThread * std::max(1, context.n_threads));
  return std::clamp<int64_t>(share, 1, product.panels_at_once);
}

// For native/library.py: the operand types for which `adds` is true, comma-separated.
const char* operand_types(bool (*adds)(bool in_bf16)) {
  try {
    const bool fp32 = adds(false);
    if (!adds(true)) return fp32 ? "fp32" : "";
    return fp32 ? "bf16,fp32" : "bf16";
  } catch (const std::exception&) {
    return "";
  }
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
  // The first bands have the longest rows, so the longest work starts first.
  share_out(context, n_bands, [&](Items& bands) {
    for (int64_t i; bands.take(i);) {
      const int64_t panel = band * i, first = panel * product.panel;
      product.add_panels(columns.panel(panel), columns.panel(panel), columns.n_units,
                         static_cast<float*>(acc.data) + first * (acc.stride + 1), acc.stride,
                         std::min(band * product.panel, x.n_cols - first), x.n_cols - first, true);
    }
  });
}

}  // namespace wanda

extern "C" __attribute__((visibility("default"))) const char* wanda_cpu_products() {
  return wanda::operand_types(wanda::adds_products);
}

extern "C" __attribute__((visibility("default"))) const char* wanda_cpu_squares() {
  return wanda::operand_types(wanda::adds_squares);
}
