// Statistics and selections on the CPU: pick the instruction set, cut the work into ranges, give every range its
// scratch. Forwards and products over tokens: launch_forward.cpp, launch_product.cpp.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "launching.h"

namespace wanda {
namespace {

using cpu::Bracket;

constexpr int64_t kUpdateRows = 32;          // each row of SparseGPT's blocks is much work
constexpr int64_t kColumnBlock = 64;         // columns are cut at multiples of this: whole cache lines
constexpr int64_t kMinStreamColumns = 256;   // and no thread's piece of a row is shorter

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) kernels.push_back(&cpu::kAvx512);
  if (avx2) kernels.push_back(&cpu::kAvx2);
#endif
  kernels.push_back(&cpu::kPortable);
  return kernels;
}

// body(begin, end, scratch) over ranges of rows.
template <typename Body>
void for_rows(const Context& context, const Matrix& matrix, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / matrix.n_cols);
  parallel_for(context, matrix.n_rows, grain, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(matrix.n_cols);
    body(begin, end, scratch.get());
  });
}

// One histogram over the whole matrix; each part counts on its own, since parts meet in every bin.
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

// The bin that holds sorted position `rank`; rank becomes the position within it.
int32_t find_bin(const std::vector<int64_t>& bins, int64_t& rank) {
  int32_t bin = 0;
  for (; rank >= bins[bin]; ++bin) rank -= bins[bin];
  return bin;
}

// Key of the score at sorted position `rank` of the whole matrix, exact: two reads, 16 bits of the key and then 15.
int32_t find_threshold(const Context& context, const Selection& s, int64_t rank) {
  const int32_t high = find_bin(histogram(context, s, -1, 1 << cpu::kHighBits), rank);
  const int32_t low = find_bin(histogram(context, s, high, 1 << cpu::kLowBits), rank);
  const int32_t key = high << cpu::kLowBits | low;
  return key == kNaNKey ? -1 : key;  // no score is <= NaN
}

int64_t prune_at_most(const Context& context, const Selection& s, const int32_t* thresholds, int64_t step) {
  const Kernels& isa = kernels();
  std::atomic<int64_t> n_pruned{0};
  for_rows(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    n_pruned += isa.prune_at_most(s, thresholds, step, begin, end, scratch);
  });
  return n_pruned;
}

int64_t find_variant(const Context& context, const Selection& s, double alpha, const std::vector<Bracket>& brackets,
                     std::vector<int32_t>& thresholds) {
  const Kernels& isa = kernels();
  std::atomic<int64_t> n_pruned{0};
  for_rows(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    n_pruned += isa.find_variant(s, alpha, brackets.data(), thresholds.data(), begin, end, scratch);
  });
  return n_pruned;
}

}  // namespace

const Kernels& kernels() {
  static const std::vector<const Kernels*> all = runnable();
  const char* wanted = std::getenv("WANDA_KERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *all.front();
  for (const Kernels* each : all) {
    if (std::strcmp(each->name, wanted) == 0) return *each;
  }
  throw std::runtime_error(std::string("WANDA_KERNELS_CPU_ISA = ") + wanted + " is unknown or cannot run here");
}

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

void prune_rows(const Context& context, const Selection& s, int64_t num_pruned) {
  const Kernels& isa = kernels();
  for_rows(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    isa.prune_rows(s, num_pruned, begin, end, scratch);
  });
}

void prune_nm(const Context& context, const Selection& s, int n, int m) {
  const Kernels& isa = kernels();
  for_rows(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    isa.prune_nm(s, n, m, begin, end, scratch);
  });
}

void prune_matrix(const Context& context, const Selection& s, int64_t rank) {
  const int32_t threshold = find_threshold(context, s, rank);
  prune_at_most(context, s, &threshold, 0);
}

void mark_lowest(const Context& context, const Selection& s, int64_t rank, uint8_t* pruned, int64_t pruned_stride) {
  const int32_t threshold = find_threshold(context, s, rank);
  const Kernels& isa = kernels();
  for_rows(context, s.weight, [&](int64_t begin, int64_t end, void* scratch) {
    isa.mark_at_most(s, threshold, pruned, pruned_stride, begin, end, scratch);
  });
}

void prune_and_update(const Context& context, const UpdateBlock& block) {
  const Kernels& isa = kernels();
  const Matrix& w = block.columns.weight;
  parallel_for(context, w.n_rows, kUpdateRows, [&](int64_t begin, int64_t end) {
    isa.prune_and_update(block, begin, end);
  });
}

// Alpha is bisected exactly as in reference.py; each row's bracket narrows along with it.
void prune_variant(const Context& context, const Selection& s, double ratio, double* settled_alpha) {
  const double numel = static_cast<double>(s.weight.n_rows * s.weight.n_cols);
  std::vector<Bracket> brackets(s.weight.n_rows, Bracket{-1, kNaNKey + 1});
  std::vector<int32_t> thresholds(s.weight.n_rows);
  double low = 0, alpha = 0.4, high = 0.8;
  double sparsity = find_variant(context, s, alpha, brackets, thresholds) / numel;
  while (std::abs(sparsity - ratio) > 0.001 && high - low >= 0.001) {
    const bool too_sparse = sparsity > ratio;
    (too_sparse ? high : low) = alpha;
    for (size_t row = 0; row < brackets.size(); ++row) {
      (too_sparse ? brackets[row].high : brackets[row].low) = thresholds[row] + (too_sparse ? 1 : 0);
    }
    alpha = (low + high) / 2;
    sparsity = find_variant(context, s, alpha, brackets, thresholds) / numel;
  }
  prune_at_most(context, s, thresholds.data(), 1);
  *settled_alpha = alpha;
}

void activate(const Context& context, const Matrix& x, Activation activation, int power, float* out) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / x.n_cols);
  const Kernels& isa = kernels();
  parallel_for(context, x.n_rows, grain, [&](int64_t begin, int64_t end) {
    isa.activate(x, activation, power, out, begin, end);
  });
}

void activate_gated(const Context& context, const Matrix& gate, const Matrix& up, Activation activation, float* out) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / gate.n_cols);
  const Kernels& isa = kernels();
  parallel_for(context, gate.n_rows, grain, [&](int64_t begin, int64_t end) {
    isa.activate_gated(gate, up, activation, out, begin, end);
  });
}

bool all_finite(const Context& context, const Matrix& x, bool non_negative) {
  std::atomic<bool> finite{true};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / x.n_cols);
  const Kernels& isa = kernels();
  parallel_for(context, x.n_rows, grain, [&](int64_t begin, int64_t end) {
    if (!isa.all_finite(x, non_negative, begin, end)) finite = false;
  });
  return finite;
}

int64_t count_zeros(const Context& context, const Matrix& x) {
  std::atomic<int64_t> n_zeros{0};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / x.n_cols);
  const Kernels& isa = kernels();
  parallel_for(context, x.n_rows, grain, [&](int64_t begin, int64_t end) { n_zeros += isa.count_zeros(x, begin, end); });
  return n_zeros;
}

}  // namespace wanda

// For `wanda-fast doctor`: the instruction set in use, and all that this machine could run, comma-separated.
extern "C" __attribute__((visibility("default"))) const char* wanda_cpu_isa() {
  try {
    return wanda::kernels().name;
  } catch (const std::exception&) {
    return "";
  }
}

// The operands, bf16 and fp32, whose products over tokens the library sums itself, comma-separated.
static const char* operands_of(bool (*sums)(bool in_bf16)) {
  try {
    const bool single = sums(false);
    if (!sums(true)) return single ? "fp32" : "";
    return single ? "bf16,fp32" : "bf16";
  } catch (const std::exception&) {
    return "";
  }
}

extern "C" __attribute__((visibility("default"))) const char* wanda_cpu_products() {
  return operands_of(wanda::adds_products);
}

extern "C" __attribute__((visibility("default"))) const char* wanda_cpu_squares() {
  return operands_of(wanda::adds_squares);
}

extern "C" __attribute__((visibility("default"))) const char* wanda_cpu_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const wanda::cpu::Kernels* each : wanda::runnable()) {
      joined += (joined.empty() ? "" : ",") + std::string(each->name);
    }
    return joined;
  }();
  return names.c_str();
}
