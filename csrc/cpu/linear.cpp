// The loop of every product with a weight. A cache full of the weight's row groups is prepared (compressed or packed)
// at a time. All tokens are multiplied with those groups before the next ones are prepared.
#include "linear.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace wanda {

bool multiply_in_groups(const Context& context, const Linear& s, const cpu::LinearKernels& isa) {
  constexpr int64_t kPartsPerThread = 12;
  const size_t group_bytes = isa.group_bytes(s.weight);
  const int64_t n_groups = (s.weight.n_rows + isa.rows - 1) / isa.rows;
  const int64_t n_cached = std::clamp<int64_t>(isa.cache_bytes / group_bytes, 1, n_groups);
  // Tokens are shared out in parts, each a whole number of tiles.
  const int64_t n_tokens = s.x.n_rows, n_parts = kPartsPerThread * context.n_threads;
  const int64_t part_tokens = std::max<int64_t>(1, n_tokens / isa.tokens / n_parts) * isa.tokens;
  const ScratchMemory memory(n_cached * group_bytes);
  char* const groups = static_cast<char*>(memory.get());
  for (int64_t first = 0; first < n_groups; first += n_cached) {
    const int64_t last = std::min(n_groups, first + n_cached);
    std::atomic<bool> fits{true};
    parallel_for(context, last - first, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && fits; ++i) {
        if (!isa.prepare(s.weight, (first + i) * isa.rows, groups + i * group_bytes)) fits = false;
      }
    });
    if (!fits) return false;
    share_out(context, (n_tokens + part_tokens - 1) / part_tokens, [&](Items& parts) {
      for (int64_t part; parts.take(part);) {
        isa.multiply(s, groups, first * isa.rows, std::min(last * isa.rows, s.weight.n_rows), part * part_tokens,
                     std::min((part + 1) * part_tokens, n_tokens));
      }
    });
  }
  return true;
}

}  // namespace wanda
