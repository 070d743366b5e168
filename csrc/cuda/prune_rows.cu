// prune_rows_ on the GPU: one block a row, one histogram over the upper part of the row's keys, exact ties.
//
// A row is read once and written once: weights and keys stay in registers. Keys are logarithms of scores, so 2048 bins
// over the 16 octaves below the highest tell the keys around the cut apart: of the bin that holds it, a dozen keys are
// left, and ranking those as (key, column) decides. Otherwise that bin is divided again, and equal keys by column.
// Rows that are too long, or not made of whole 16-byte vectors, keep keys in shared memory or, where those do not fit,
// compute them anew from L2 in each pass.
#include <type_traits>

#include "block.cuh"

namespace wanda {
namespace {

constexpr int kVector = 8;  // columns a thread takes at once: 16 bytes of fp16, one byte of mask
constexpr int kBins = 2048, kBinBits = 11;
constexpr int kWindowShift = 16;  // 128 bins an octave, 16 octaves
constexpr uint32_t kWindow = (uint32_t{kBins} << kWindowShift) - 1;
constexpr uint32_t kMostCandidates = 128;
constexpr uint32_t kNowhere = 0xffffffffu;  // a value that takes no part
constexpr int kFewThreads = 512, kManyThreads = 1024, kMostVectors = 4;
constexpr size_t kStaticBytes = kBins * sizeof(uint32_t) + 1024;  // most of Search

// (key, column) below (bound, column).
struct Cut {
  uint32_t bound, column;
  __device__ bool prunes(uint32_t key, uint32_t col) const { return key < bound || (key == bound && col < column); }
};

// Shared memory of a block.
struct alignas(16) Search {
  union {
    uint32_t bins[kBins + 4];              // one more for kNowhere
    uint64_t candidates[kMostCandidates];  // once the bin is known
  };
  uint32_t of_warp[kWarp];
  Place<uint32_t> place;
  uint32_t n_candidates;
  Cut cut;
};

// What decides among equal keys that stand astride the cut: the column; lower keys stay below, higher ones above.
__device__ inline uint32_t tie_key(uint32_t key, uint32_t bound, uint32_t col) {
  return key == bound ? col + 1 : key < bound ? 0 : kNowhere;
}

// Keeps the compiler from computing before a loop, and holding in registers, what follows from `value`.
__device__ inline void opaque(uint32_t& value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
}

// ---- the keys of a row, in registers or not

// Whole vectors of 16-bit or 32-bit weights, in as many words as they take.
template <typename T>
struct Words {
  static constexpr int kChunks = kVector * sizeof(T) / sizeof(uint4);
  uint32_t words[4 * kChunks];

  __device__ void load(const T* at) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint4 chunk = __ldcs(reinterpret_cast<const uint4*>(at) + i);  // the L1 is for what all rows share
      words[4 * i] = chunk.x, words[4 * i + 1] = chunk.y, words[4 * i + 2] = chunk.z, words[4 * i + 3] = chunk.w;
    }
  }
  __device__ void store(T* at) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      reinterpret_cast<uint4*>(at)[i] = uint4{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
    }
  }
  __device__ float value(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, BFloat>) {
      return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else {
      return to_float(Half{static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2])});
    }
  }
  __device__ void clear(int i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = 0;
    } else {
      words[i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
    }
  }
};

__device__ inline uint32_t key_of_score(float score) {
  return min(__float_as_uint(score) & 0x7fffffffu, static_cast<uint32_t>(kNaNKey));
}

enum class Scale { kNone, kVector, kMatrix };

template <typename T, int kVectors, Scale kScale, bool kHoldsWeights>
struct RegisterKeys {
  Words<T> weights[kVectors];
  uint32_t keys[kVectors][kVector];

  static __device__ uint32_t column(int v) { return (v * blockDim.x + threadIdx.x) * kVector; }

  __device__ __forceinline__ void load(const T* row, uint32_t n_cols) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = {};
      if (column(v) < n_cols) weights[v].load(row + column(v));
    }
  }
  // Returns the thread's highest. `factors`: roots, or a scale matrix's row.
  __device__ __forceinline__ uint32_t compute(const T* row, const float* factors, uint32_t n_cols) {
    uint32_t highest = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) < n_cols) {
        if constexpr (!kHoldsWeights) weights[v].load(row + column(v));
        Words<float> factor;
        if constexpr (kScale == Scale::kVector) load_roots(factor, factors + column(v));
        if constexpr (kScale == Scale::kMatrix) factor.load(factors + column(v));
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          float score = weights[v].value(i);
          if constexpr (kScale == Scale::kVector) score = __fmul_rn(score, factor.value(i));
          if constexpr (kScale == Scale::kMatrix) score = __fmul_rn(score, __fsqrt_rn(factor.value(i)));
          keys[v][i] = key_of_score(score);
          highest = max(highest, keys[v][i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) keys[v][i] = kNowhere;
      }
    }
    return highest;
  }
  template <typename Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) body(keys[v][i]);
    }
  }
  // Appends the few with keys in [low, high].
  __device__ __forceinline__ void collect(Search& search, uint32_t low, uint32_t high) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t nearest = kNowhere;
#pragma unroll
      for (int i = 0; i < kVector; ++i) nearest = min(nearest, keys[v][i] - low);
      if (nearest > high - low) continue;
      uint32_t wanted = 0, begin = low, col = column(v);
      opaque(begin);
#pragma unroll
      for (int i = 0; i < kVector; ++i) wanted |= static_cast<uint32_t>(keys[v][i] - begin <= high - low) << i;
      uint64_t* next = &search.candidates[atomicAdd(&search.n_candidates, static_cast<uint32_t>(__popc(wanted)))];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (wanted >> i & 1) *next++ = uint64_t{keys[v][i]} << 32 | (col + i);
      }
    }
  }
  __device__ __forceinline__ void turn_into_columns(uint32_t bound) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) keys[v][i] = tie_key(keys[v][i], bound, column(v) + i);
    }
  }

 private:
  static __device__ void load_roots(Words<float>& to, const float* at) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(at) + i);
      to.words[4 * i] = chunk.x, to.words[4 * i + 1] = chunk.y, to.words[4 * i + 2] = chunk.z,
                   to.words[4 * i + 3] = chunk.w;
    }
  }
};

template <typename T, bool kShared>
struct LongKeys {
  const Selection& s;
  int64_t row;
  uint32_t* shared;
  bool are_columns = false;
  uint32_t bound = 0;

  __device__ uint32_t computed(uint32_t col) const { return key_of(s, row_of<T>(s.weight, row)[col], row, col); }
  __device__ uint32_t key(uint32_t col) const {
    const uint32_t key = kShared ? shared[col] : computed(col);
    return are_columns ? tie_key(key, bound, col) : key;
  }
  // Returns the thread's highest.
  __device__ uint32_t compute() const {
    uint32_t highest = 0;
    for_columns([&](uint32_t col) {
      const uint32_t each = computed(col);
      if (kShared) shared[col] = each;
      highest = max(highest, each);
    });
    return highest;
  }
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    for_columns([&](uint32_t col) { body(key(col)); });
  }
  __device__ void collect(Search& search, uint32_t low, uint32_t high) const {
    for_columns([&](uint32_t col) {
      const uint32_t each = key(col);
      if (each - low > high - low) return;
      search.candidates[atomicAdd(&search.n_candidates, 1u)] = uint64_t{each} << 32 | col;
    });
  }
  __device__ void turn_into_columns(uint32_t of_ties) { are_columns = true, bound = of_ties; }

 private:
  template <typename Body>
  __device__ void for_columns(const Body& body) const {
#pragma unroll 1
    for (uint32_t col = threadIdx.x; col < s.weight.n_cols; col += blockDim.x) body(col);
  }
};

// ---- the search

__device__ inline void clear_bins(Search& search) {
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < kBins / 4; i += blockDim.x) {
    reinterpret_cast<uint4*>(search.bins)[i] = uint4{0, 0, 0, 0};
  }
}

__device__ inline uint32_t max_of_block(Search& search, uint32_t value) {
  const unsigned lane = threadIdx.x % kWarp, n_warps = blockDim.x / kWarp;
  value = __reduce_max_sync(kAllLanes, value);
  if (lane == 0) search.of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, lane < n_warps ? search.of_warp[lane] : 0);
}

// The bin that holds a sorted position. The block meets at its begin and its end.
__device__ inline Place<uint32_t> find_bin(Search& search, uint32_t position) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int each_bits = max(0, kBinBits - 2 - (31 - __clz(static_cast<int>(blockDim.x))));
  const unsigned each = 1u << each_bits, first = threadIdx.x * each;  // fours of bins
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
      search.place = {static_cast<int>(bin), position - before, search.bins[bin]};
      search.n_candidates = 0;
    }
  }
  __syncthreads();
  return search.place;
}

// The cut behind the candidate of rank `position`: every warp ranks some.
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
      search.cut = n_later_equals == 0 ? Cut{value + 1, 0} : Cut{value, col + 1};
    }
  }
}

__device__ inline int shift_for(uint32_t width, int bits) {
  return max(0, 32 - __clz(static_cast<int>(width)) - bits);
}

// `highest` is the thread's. Bins are clear.
template <typename Keys>
__device__ __forceinline__ Cut find_cut(Search& search, Keys& keys, uint32_t highest, uint32_t n_cols,
                                        uint32_t num_pruned) {
  uint32_t high = max_of_block(search, highest);
  if (num_pruned == 0) return {0, 0};
  uint32_t low = high > kWindow ? high - kWindow : 0;
  int shift = kWindowShift;
#pragma unroll 1
  while (true) {
    keys.for_each([&](uint32_t key) {  // what is below `low` is the first bin's too
      atomicAdd(&search.bins[min((max(key, low) - low) >> shift, uint32_t{kBins})], 1u);
    });
    const Place<uint32_t> place = find_bin(search, num_pruned - 1);
    const uint32_t first = place.bin == 0 ? 0 : low + (static_cast<uint32_t>(place.bin) << shift);
    high = min(high, low + (static_cast<uint32_t>(place.bin + 1) << shift) - 1);
    if (place.rest + 1 == place.count) return {high + 1, 0};
    if (place.count <= kMostCandidates) {
      keys.collect(search, first, high);
      __syncthreads();
      rank_candidates(search, place.count, place.rest);
      __syncthreads();
      return search.cut;
    }
    if (first < high) {
      shift = shift_for(high - first, kBinBits - 1);
      low = first - min(first, uint32_t{1} << shift);  // what is below has a bin of its own
    } else {
      keys.turn_into_columns(first);
      low = 0, high = n_cols, shift = shift_for(n_cols, kBinBits);
    }
    clear_bins(search);
    __syncthreads();
  }
}

// ---- kernels

// Blocks of so many threads that a multiprocessor must have room for: two where keys and weights leave it.
template <typename T, int kVectors, int kThreads>
constexpr int blocks_for = kThreads == kFewThreads && kVectors * (kVector + Words<T>::kChunks * 4) <= 36 ? 2 : 1;

// Rows of whole vectors.
template <typename T, int kVectors, Scale kScale, int kThreads>
__global__ void __launch_bounds__(kThreads, blocks_for<T, kVectors, kThreads>)
    prune_rows_kernel(Selection s, uint32_t num_pruned) {
  __shared__ Search search;
  const int64_t row = blockIdx.x;
  const uint32_t n_cols = static_cast<uint32_t>(s.weight.n_cols);
  T* weights = row_of<T>(s.weight, row);
  constexpr bool kHoldsWeights = kThreads == kFewThreads;  // else they are read again, from L2
  RegisterKeys<T, kVectors, kScale, kHoldsWeights> keys;
  if constexpr (kHoldsWeights) keys.load(weights, n_cols);
  clear_bins(search);  // while the weights come
  const float* factors = kScale == Scale::kMatrix ? s.scale + row * s.scale_stride : s.root;
  const uint32_t highest = keys.compute(weights, factors, n_cols);
  const Cut cut = find_cut(search, keys, highest, n_cols, num_pruned);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t col = keys.column(v);
    if (col >= n_cols) continue;
    unsigned pruned = 0;
    if (cut.column == 0) {  // no ties astride it
#pragma unroll
      for (int i = 0; i < kVector; ++i) pruned |= static_cast<unsigned>(keys.keys[v][i] < cut.bound) << i;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) pruned |= static_cast<unsigned>(cut.prunes(keys.keys[v][i], col + i)) << i;
    }
    if constexpr (!kHoldsWeights) keys.weights[v].load(weights + col);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (pruned >> i & 1) keys.weights[v].clear(i);
    }
    keys.weights[v].store(weights + col);
    if (s.mask != nullptr) mask_row(s, row)[col / kVector] = static_cast<uint8_t>(~pruned);
  }
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kManyThreads) prune_long_rows_kernel(Selection s, uint32_t num_pruned) {
  __shared__ Search search;
  const int64_t row = blockIdx.x, n_cols = s.weight.n_cols;
  LongKeys<T, kShared> keys = {s, row, kShared ? reinterpret_cast<uint32_t*>(dynamic_shared()) : nullptr};
  clear_bins(search);
  const Cut cut = find_cut(search, keys, keys.compute(), static_cast<uint32_t>(n_cols), num_pruned);
  T* weights = row_of<T>(s.weight, row);
#pragma unroll 1
  for (int64_t byte = threadIdx.x; byte < (n_cols + 7) / 8; byte += blockDim.x) {
    unsigned kept = 0;
#pragma unroll 1
    for (int i = 0; i < 8 && byte * 8 + i < n_cols; ++i) {
      const uint32_t col = static_cast<uint32_t>(byte * 8 + i);
      const bool prunes = cut.prunes(keys.key(col), col);
      if (prunes) weights[col] = T{};
      kept |= static_cast<unsigned>(!prunes) << i;
    }
    if (s.mask != nullptr) mask_row(s, row)[byte] = static_cast<uint8_t>(kept);
  }
}

int vectors_for(int64_t n_cols) {
  if (n_cols <= 512) return 1;
  if (n_cols <= 8192) return 2;
  return n_cols <= 12288 ? 3 : 4;
}

template <typename T, int kVectors, int kThreads = kFewThreads>
void prune_in_registers(const Context& context, const Selection& s, uint32_t num_pruned) {
  const int64_t per_warp = int64_t{kWarp} * kVectors * kVector;
  const int n_threads = static_cast<int>((s.weight.n_cols + per_warp - 1) / per_warp) * kWarp;
  auto kernel = prune_rows_kernel<T, kVectors, Scale::kNone, kThreads>;
  if (s.root != nullptr) kernel = prune_rows_kernel<T, kVectors, Scale::kVector, kThreads>;
  if (s.scale != nullptr) kernel = prune_rows_kernel<T, kVectors, Scale::kMatrix, kThreads>;
  launch(kernel, dim3(static_cast<unsigned>(s.weight.n_rows)), n_threads, 0, context.stream, s, num_pruned);
}

template <typename T>
void prune_long(const Context& context, const Selection& s, uint32_t num_pruned) {
  const size_t key_bytes = s.weight.n_cols * sizeof(uint32_t);
  const bool fits = key_bytes + kStaticBytes <= shared_memory_limit();
  const int n_threads = s.weight.n_cols <= 2048 ? 128 : s.weight.n_cols <= 16384 ? 512 : kManyThreads;
  const auto kernel = fits ? prune_long_rows_kernel<T, true> : prune_long_rows_kernel<T, false>;
  launch(kernel, dim3(static_cast<unsigned>(s.weight.n_rows)), n_threads, fits ? key_bytes : 0, context.stream, s,
         num_pruned);
}

// Every vector of the row, and of what scales it, is whole and on a boundary of 16 bytes.
template <typename T>
bool is_whole(const Selection& s) {
  const auto is_aligned_row = [](const float* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; };
  return s.weight.n_cols % kVector == 0 && is_aligned<T>(s.weight) && is_aligned_row(s.root) &&
         is_aligned_row(s.scale) && s.scale_stride % 4 == 0;
}

}  // namespace

void prune_rows(const Context& context, const Selection& s, int64_t num_pruned) {
  const uint32_t count = static_cast<uint32_t>(num_pruned);
  for_dtype(s.weight.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t n_cols = s.weight.n_cols;
    if (!is_whole<T>(s) || n_cols > kManyThreads * kMostVectors * kVector) return prune_long<T>(context, s, count);
    if (n_cols > kFewThreads * kMostVectors * kVector) {
      return prune_in_registers<T, kMostVectors, kManyThreads>(context, s, count);
    }
    switch (vectors_for(n_cols)) {
      case 1: return prune_in_registers<T, 1>(context, s, count);
      case 2: return prune_in_registers<T, 2>(context, s, count);
      case 3: return prune_in_registers<T, 3>(context, s, count);
      default: return prune_in_registers<T, 4>(context, s, count);
    }
  });
}

}  // namespace wanda
