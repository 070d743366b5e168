// prune_nm_ on the GPU. m = 2, 4, 8, 16, 32: a thread owns whole groups in registers, read and written in 16 bytes, no
// shared memory. Any other m: a lane owns one weight, and ranks come from shuffles within the warp.
#include "block.cuh"

namespace wanda {
namespace {

constexpr int kThreads = 256;

// A thread's columns: whole groups, whole bytes of mask, whole 16-byte accesses.
template <int kGroup>
constexpr int kOwnedColumns = kGroup < 8 ? 8 : kGroup;

template <int kGroup>
__device__ uint32_t pruned_by_rank(const uint32_t* keys, int num_pruned) {
  int rank[kGroup] = {};
#pragma unroll
  for (int later = 1; later < kGroup; ++later) {
#pragma unroll
    for (int col = 0; col < later; ++col) {
      const bool in_order = keys[col] <= keys[later];  // equal: the lower column is pruned first
      rank[later] += in_order;
      rank[col] += !in_order;
    }
  }
  uint32_t pruned = 0;
#pragma unroll
  for (int col = 0; col < kGroup; ++col) pruned |= static_cast<uint32_t>(rank[col] < num_pruned) << col;
  return pruned;
}

__device__ inline void order(uint32_t& low, uint32_t& high) {
  const uint32_t least = min(low, high);
  high = max(low, high);
  low = least;
}

// Batcher's odd-even merge sort; by recursion on constants, so that keys stay in registers.
template <int kFirst, int kSize, int kStep>
__device__ void merge_halves(uint32_t* keys) {
  if constexpr (2 * kStep < kSize) {
    merge_halves<kFirst, kSize, 2 * kStep>(keys);
    merge_halves<kFirst + kStep, kSize, 2 * kStep>(keys);
#pragma unroll
    for (int i = kFirst + kStep; i + kStep < kFirst + kSize; i += 2 * kStep) order(keys[i], keys[i + kStep]);
  } else {
    order(keys[kFirst], keys[kFirst + kStep]);
  }
}
template <int kFirst, int kSize>
__device__ void sort_ascending(uint32_t* keys) {
  if constexpr (kSize > 1) {
    sort_ascending<kFirst, kSize / 2>(keys);
    sort_ascending<kFirst + kSize / 2, kSize / 2>(keys);
    merge_halves<kFirst, kSize, 1>(keys);
  }
}

// What a large group prunes, by its num_pruned-th lowest key: 14 operations a key for groups of 32, where comparing
// every pair takes 46. The two halves are sorted; the best split into i of one and num_pruned - i of the other tells.
template <int kGroup>
__device__ uint32_t pruned_by_sorting(const uint32_t* keys, int num_pruned) {
  constexpr int kHalf = kGroup / 2;
  uint32_t sorted[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sorted[i] = keys[i];
  sort_ascending<0, kHalf>(sorted);
  sort_ascending<kHalf, kHalf>(sorted);
  const uint32_t *a = sorted, *b = sorted + kHalf;
  uint32_t nth = 0xffffffffu;
  if (num_pruned == kHalf) {  // as a rule, and the only case that needs no index known at run time
    nth = min(a[kHalf - 1], b[kHalf - 1]);
#pragma unroll
    for (int i = 1; i < kHalf; ++i) nth = min(nth, max(a[i - 1], b[kHalf - i - 1]));
  } else {
#pragma unroll
    for (int i = 0; i <= kHalf; ++i) {
#pragma unroll
      for (int j = 0; j <= kHalf; ++j) {
        if (i + j != num_pruned || i + j == 0) continue;
        nth = min(nth, i == 0 ? b[j - 1] : j == 0 ? a[i - 1] : max(a[i - 1], b[j - 1]));
      }
    }
  }
  uint32_t pruned = 0;
#pragma unroll
  for (int col = 0; col < kGroup; ++col) pruned |= static_cast<uint32_t>(keys[col] <= nth) << col;
  if (__popc(pruned) == num_pruned) return pruned;
  int left = num_pruned;  // more are equal to nth than may go: the lower columns do
#pragma unroll
  for (int col = 0; col < kGroup; ++col) left -= keys[col] < nth;
#pragma unroll
  for (int col = 0; col < kGroup; ++col) {
    if (keys[col] == nth && left-- <= 0) pruned &= ~(1u << col);
  }
  return pruned;
}

template <int kGroup>
__device__ uint32_t pruned_of_group(const uint32_t* keys, int num_pruned) {
  if constexpr (kGroup >= 8) return pruned_by_sorting<kGroup>(keys, num_pruned);
  return pruned_by_rank<kGroup>(keys, num_pruned);
}

template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads) prune_nm_kernel(Selection s, int num_pruned, bool aligned) {
  constexpr int kOwned = kOwnedColumns<kGroup>;
  const int64_t n_cols = s.weight.n_cols, per_row = (n_cols + kOwned - 1) / kOwned;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= per_row * s.weight.n_rows) return;
  const bool is_short = per_row * s.weight.n_rows <= 0xffffffff;  // a 64-bit division costs as much as the rest
  const int64_t row = is_short ? static_cast<uint32_t>(index) / static_cast<uint32_t>(per_row) : index / per_row;
  const int64_t first = (index - row * per_row) * kOwned;
  T* weights = row_of<T>(s.weight, row);
  Pack<T, kOwned> pack;
  pack.load(weights, first, n_cols, aligned);
  uint32_t keys[kOwned], pruned = 0;
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    keys[i] = first + i < n_cols ? key_of(s, pack.values[i], row, first + i) : kPaddingKey;
  }
#pragma unroll
  for (int i = 0; i < kOwned; i += kGroup) pruned |= pruned_of_group<kGroup>(keys + i, num_pruned) << i;
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    if (pruned >> i & 1) pack.values[i] = T{};
  }
  pack.store(weights, first, n_cols, aligned);
  if (s.mask == nullptr) return;
  const int64_t n_owned = n_cols - first < kOwned ? n_cols - first : kOwned;
  const uint32_t kept = ~pruned & (n_owned == 32 ? 0xffffffffu : (1u << n_owned) - 1);
  for (int byte = 0; byte * 8 < n_owned; ++byte) {
    mask_row(s, row)[first / 8 + byte] = static_cast<uint8_t>(kept >> byte * 8);
  }
}

// One block a row; a warp takes 32 / m groups at a time. Bits of the mask meet in shared memory.
template <typename T>
__global__ void __launch_bounds__(kThreads) prune_any_nm_kernel(Selection s, int num_pruned, int m) {
  const int64_t row = blockIdx.x, n_cols = s.weight.n_cols, n_words = (n_cols + 31) / 32;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, n_warps = kThreads / kWarp;
  const int per_warp = kWarp / m * m, place = lane % m, group = lane - place;
  uint32_t* pruned = s.mask != nullptr ? reinterpret_cast<uint32_t*>(dynamic_shared()) : nullptr;
  for (int64_t word = threadIdx.x; pruned != nullptr && word < n_words; word += kThreads) pruned[word] = 0;
  __syncthreads();
  T* weights = row_of<T>(s.weight, row);
  for (int64_t first = warp * per_warp; first < n_cols; first += n_warps * per_warp) {
    const int64_t col = first + lane;
    const bool active = lane < per_warp && col < n_cols;
    const uint32_t key = active ? key_of(s, weights[col], row, col) : kPaddingKey;
    int rank = 0;
    for (int step = 1; step < m; ++step) {
      const int partner = group + (place + step) % m;
      const uint32_t other = __shfl_sync(kAllLanes, key, partner);  // lanes past 31 wrap, and are not active
      rank += other < key || (other == key && partner < lane);
    }
    if (!active || rank >= num_pruned) continue;
    weights[col] = T{};
    if (pruned != nullptr) atomicOr(&pruned[col / 32], 1u << col % 32);
  }
  __syncthreads();
  if (pruned == nullptr) return;
  for (int64_t byte = threadIdx.x; byte < (n_cols + 7) / 8; byte += kThreads) {
    const uint32_t of_byte = ~(pruned[byte / 4] >> byte % 4 * 8);
    const int64_t left = n_cols - byte * 8;
    mask_row(s, row)[byte] = static_cast<uint8_t>(of_byte & (left < 8 ? (1u << left) - 1 : 0xffu));
  }
}

template <typename T, int kGroup>
void launch_group(const Context& context, const Selection& s, int num_pruned) {
  const int64_t per_row = (s.weight.n_cols + kOwnedColumns<kGroup> - 1) / kOwnedColumns<kGroup>;
  const int64_t n_blocks = (per_row * s.weight.n_rows + kThreads - 1) / kThreads;
  launch(prune_nm_kernel<T, kGroup>, dim3(static_cast<unsigned>(n_blocks)), kThreads, 0, context.stream, s,
         num_pruned, is_aligned<T>(s.weight));
}

template <typename T>
void launch_nm(const Context& context, const Selection& s, int num_pruned, int m) {
  switch (m) {
    case 2: return launch_group<T, 2>(context, s, num_pruned);
    case 4: return launch_group<T, 4>(context, s, num_pruned);
    case 8: return launch_group<T, 8>(context, s, num_pruned);
    case 16: return launch_group<T, 16>(context, s, num_pruned);
    case 32: return launch_group<T, 32>(context, s, num_pruned);
  }
  const size_t bits = s.mask == nullptr ? 0 : (s.weight.n_cols + 31) / 32 * sizeof(uint32_t);
  launch(prune_any_nm_kernel<T>, dim3(static_cast<unsigned>(s.weight.n_rows)), kThreads, bits, context.stream, s,
         num_pruned, m);
}

}  // namespace

void prune_nm(const Context& context, const Selection& s, int n, int m) {
  for_dtype(s.weight.dtype, [&](auto element) { launch_nm<decltype(element)>(context, s, m - n, m); });
}

}  // namespace wanda
