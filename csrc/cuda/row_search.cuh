// The threshold of a row: every key below it is pruned, and the lower columns of the keys equal to it.
//   1. Count keys in 2048 bins over the 16 octaves below the largest one. A key's bits grow with the logarithm of its
//      score, so bins are of equal relative width.
//   2. Find the bin that holds the threshold.
//   3. If it holds few keys, usually a dozen, rank them by (key, column). That gives the threshold.
//   4. Otherwise divide that bin again. If all its keys are equal, divide their columns.
#pragma once

#include "block.cuh"

namespace wanda {

constexpr int kBins = 2048, kBinBits = 11;
constexpr int kWindowShift = 16;  // 128 bins an octave, 16 octaves
constexpr uint32_t kWindow = (uint32_t{kBins} << kWindowShift) - 1;
constexpr uint32_t kMostCandidates = 128;
constexpr uint32_t kIgnored = 0xffffffffu;  // a value that is never counted or collected

// Prunes every (key, column) below this one.
struct Threshold {
  uint32_t key, column;
  __device__ bool prunes(uint32_t other, uint32_t col) const { return other < key || (other == key && col < column); }
};

// Shared memory of a block.
struct alignas(16) Search {
  union {
    uint32_t bins[kBins + 4];              // bin kBins collects kIgnored
    uint64_t candidates[kMostCandidates];  // (key, column), when the bin is known
  };
  uint32_t of_warp[kWarp];
  BinOfRank<uint32_t> found;
  uint32_t n_candidates;
  Threshold threshold;
};

// Used when the threshold is among keys equal to `bound`, which the column then decides. An equal key becomes its
// column + 1, a lower key 0, and a higher key is ignored.
__device__ inline uint32_t tie_key(uint32_t key, uint32_t bound, uint32_t col) {
  return key == bound ? col + 1 : key < bound ? 0 : kIgnored;
}

__device__ inline void clear_bins(Search& search) {
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < kBins / 4; i += blockDim.x) {
    reinterpret_cast<uint4*>(search.bins)[i] = uint4{0, 0, 0, 0};
  }
}

// The bin that holds a sorted position. The block synchronises before and after the search.
__device__ inline BinOfRank<uint32_t> find_bin(Search& search, uint32_t position) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int each_bits = max(0, kBinBits - 2 - (31 - __clz(static_cast<int>(blockDim.x))));
  const unsigned each = 1u << each_bits, first = threadIdx.x * each;  // in groups of 4 bins
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll 2
  for (unsigned i = first; i < min(first + each, unsigned{kBins / 4}); ++i) {
    const uint4 four = reinterpret_cast<const uint4*>(search.bins)[i];
    sum += four.x + four.y + four.z + four.w;
  }
  const uint32_t total = __reduce_add_sync(kAllLanes, sum);
  if (lane == 0) search.of_warp[warp] = total;
  __syncthreads();
  const uint32_t before_warp = __reduce_add_sync(kAllLanes, lane < warp ? search.of_warp[lane] : 0);
  if (before_warp <= position && position < before_warp + total) {  // true of one warp
    uint32_t before = before_warp + inclusive_scan_of_warp(sum) - sum;
    if (before <= position && position < before + sum) {  // true of one thread
      unsigned bin = 4 * first;
#pragma unroll 1
      for (; position >= before + search.bins[bin]; ++bin) before += search.bins[bin];
      search.found = {static_cast<int>(bin), position - before, search.bins[bin]};
      search.n_candidates = 0;
    }
  }
  __syncthreads();
  return search.found;
}

// Sets the threshold just above the candidate of rank `position`. Each warp ranks some of the candidates.
__device__ inline void rank_candidates(Search& search, uint32_t n, uint32_t position) {
  const unsigned lane = threadIdx.x % kWarp, n_warps = blockDim.x / kWarp;
#pragma unroll 1
  for (unsigned i = threadIdx.x / kWarp; i < n; i += n_warps) {
    const uint64_t mine = search.candidates[i];
    unsigned n_lower = 0, n_later_equals = 0;
#pragma unroll 1
    for (unsigned first = 0; first < n; first += kWarp) {
      const uint64_t other = first + lane < n ? search.candidates[first + lane] : ~uint64_t{0};
      n_lower += __popc(__ballot_sync(kAllLanes, other < mine));
      n_later_equals += __popc(__ballot_sync(kAllLanes, other > mine && other >> 32 == mine >> 32));
    }
    if (lane == 0 && n_lower == position) {
      const uint32_t value = static_cast<uint32_t>(mine >> 32), col = static_cast<uint32_t>(mine);
      search.threshold = n_later_equals == 0 ? Threshold{value + 1, 0} : Threshold{value, col + 1};
    }
  }
}

__device__ inline int shift_for(uint32_t width, int bits) {
  return max(0, 32 - __clz(static_cast<int>(width)) - bits);
}

// `highest` is the thread's largest key. The bins must be clear.
template <typename Keys>
__device__ __forceinline__ Threshold find_threshold(Search& search, Keys& keys, uint32_t highest, uint32_t n_cols,
                                                    uint32_t num_pruned) {
  uint32_t high = max_of_block(search.of_warp, highest);
  if (num_pruned == 0) return {0, 0};
  uint32_t low = high > kWindow ? high - kWindow : 0;
  int shift = kWindowShift;
#pragma unroll 1
  while (true) {
    // Keys below `low` go to the first bin.
    keys.for_each([&](uint32_t key) {
      atomicAdd(&search.bins[min((max(key, low) - low) >> shift, uint32_t{kBins})], 1u);
    });
    const BinOfRank<uint32_t> found = find_bin(search, num_pruned - 1);
    const uint32_t first = found.bin == 0 ? 0 : low + (static_cast<uint32_t>(found.bin) << shift);
    high = min(high, low + (static_cast<uint32_t>(found.bin + 1) << shift) - 1);
    if (found.rank + 1 == found.count) return {high + 1, 0};
    if (found.count <= kMostCandidates) {
      keys.collect(search, first, high);
      __syncthreads();
      rank_candidates(search, found.count, found.rank);
      __syncthreads();
      return search.threshold;
    }
    if (first < high) {
      shift = shift_for(high - first, kBinBits - 1);
      low = first - min(first, uint32_t{1} << shift);  // keys below `first` get a bin of their own
    } else {
      keys.turn_into_columns(first);
      low = 0, high = n_cols, shift = shift_for(n_cols, kBinBits);
    }
    clear_bins(search);
    __syncthreads();
  }
}

}  // namespace wanda
