// prune_rows_ on the GPU: one block a row, adaptive radix selection, exact ties.
//
// A digit is (key - low) >> shift, scaled to 2048 bins over [min, max] of the row: at most 3 passes over 31-bit keys,
// without the few hot bins that a plain radix of exponents has. Equal keys are decided the same way, by column.
// Weights are read once and written once; keys stay in shared memory, or in rows too long for that (more than
// about 39,000 columns on sm_80, 23,000 on sm_89, 55,000 on sm_90) are computed anew from L2 in each pass.
#include "block.cuh"

namespace wanda {
namespace {

constexpr int kBins = 2048;
constexpr int kBinBits = 11;
constexpr size_t kStaticBytes = kBins * sizeof(uint32_t) + 1024;  // the histogram, and small arrays of the block
constexpr int kVector = 8;  // columns a thread takes at once: 16 bytes of fp16, one byte of mask

// The keys of a row, from shared memory or from the weights.
template <typename T, bool kShared>
struct Keys {
  const Selection& s;
  int64_t row;
  const uint32_t* shared;

  __device__ uint32_t operator()(int64_t col) const {
    return kShared ? shared[col] : key_of(s, row_of<T>(s.weight, row)[col], row, col);
  }
};

template <typename T, bool kShared>
__device__ KeyRange read_keys(const Selection& s, int64_t row, bool aligned, uint32_t* shared) {
  const T* weights = row_of<T>(s.weight, row);
  const int64_t n_cols = s.weight.n_cols;
  KeyRange range = {0xffffffffu, 0};
  for (int64_t col = threadIdx.x * kVector; col < n_cols; col += blockDim.x * kVector) {
    Pack<T, kVector> pack;
    pack.load(weights, col, n_cols, aligned);
    for (int i = 0; i < kVector && col + i < n_cols; ++i) {
      const uint32_t key = key_of(s, pack.values[i], row, col + i);
      if (kShared) shared[col + i] = key;
      range.low = min(range.low, key);
      range.high = max(range.high, key);
    }
  }
  return range_of_block(range);
}

// All values below `bound` are pruned, and the first `ties` of those equal to it.
struct Bound {
  uint32_t bound, ties;
};

// The bound that prunes `count` > 0 of the values in [low, high]; values outside take no part.
template <typename Value>
__device__ Bound find_bound(int64_t n, const Value& value, uint32_t low, uint32_t high, uint32_t count,
                            uint32_t* bins) {
  uint32_t position = count - 1;  // of the last one pruned
  while (true) {
    const int range_bits = 32 - __clz(high - low | 1);
    const int shift = max(0, range_bits - kBinBits);
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t each = value(i);
      if (low <= each && each <= high) atomicAdd(&bins[(each - low) >> shift], 1u);
    }
    __syncthreads();
    const Place<uint32_t> place = find_place(bins, kBins, position);
    const uint32_t first = low + (static_cast<uint32_t>(place.bin) << shift);
    if (place.rest + 1 == place.count) return {first + (1u << shift), 0};
    if (shift == 0) return {first, place.rest + 1};
    low = first;
    high = min(high, first + (1u << shift) - 1);
    position = place.rest;
  }
}

// (key, column) below (bound, cut).
struct Cut {
  uint32_t bound;
  int64_t column;
  __device__ bool prunes(uint32_t key, int64_t col) const { return key < bound || (key == bound && col < column); }
};

template <typename Keys>
__device__ Cut find_cut(const Keys& keys, int64_t n_cols, KeyRange range, int64_t num_pruned) {
  __shared__ uint32_t bins[kBins];
  if (num_pruned == 0) return {0, 0};
  const Bound by_key = find_bound(n_cols, keys, range.low, range.high, static_cast<uint32_t>(num_pruned), bins);
  if (by_key.ties == 0) return {by_key.bound, 0};
  const auto column_of_tie = [&](int64_t col) {
    return keys(col) == by_key.bound ? static_cast<uint32_t>(col) : 0xffffffffu;
  };
  const uint32_t last = static_cast<uint32_t>(n_cols - 1);
  return {by_key.bound, find_bound(n_cols, column_of_tie, 0, last, by_key.ties, bins).bound};
}

template <typename Keys>
__device__ void write_mask(const Keys& keys, uint8_t* mask, int64_t n_cols, Cut cut) {
  for (int64_t byte = threadIdx.x; byte < (n_cols + 7) / 8; byte += blockDim.x) {
    unsigned kept = 0;
    for (int i = 0; i < 8 && byte * 8 + i < n_cols; ++i) {
      const int64_t col = byte * 8 + i;
      kept |= static_cast<unsigned>(!cut.prunes(keys(col), col)) << i;
    }
    mask[byte] = static_cast<uint8_t>(kept);
  }
}

template <typename T, bool kShared>
__global__ void prune_rows_kernel(Selection s, int64_t num_pruned, bool aligned) {
  const int64_t row = blockIdx.x, n_cols = s.weight.n_cols;
  uint32_t* shared = kShared ? reinterpret_cast<uint32_t*>(dynamic_shared()) : nullptr;
  const KeyRange range = read_keys<T, kShared>(s, row, aligned, shared);
  __syncthreads();
  const Keys<T, kShared> keys = {s, row, shared};
  const Cut cut = find_cut(keys, n_cols, range, num_pruned);
  if (s.mask != nullptr) write_mask(keys, mask_row(s, row), n_cols, cut);
  __syncthreads();  // keys may come from the weights that are written now
  T* weights = row_of<T>(s.weight, row);
  for (int64_t col = threadIdx.x * kVector; col < n_cols; col += blockDim.x * kVector) {
    Pack<T, kVector> pack;
    pack.load(weights, col, n_cols, aligned);
    for (int i = 0; i < kVector && col + i < n_cols; ++i) {
      if (cut.prunes(keys(col + i), col + i)) pack.values[i] = T{};
    }
    pack.store(weights, col, n_cols, aligned);
  }
}

int threads_for(int64_t n_cols) {
  if (n_cols <= 1024) return 128;
  if (n_cols <= 8192) return 256;  // several blocks a multiprocessor hide each other's barriers
  return n_cols <= 16384 ? 512 : 1024;
}

}  // namespace

void prune_rows(const Context& context, const Selection& s, int64_t num_pruned) {
  const size_t key_bytes = s.weight.n_cols * sizeof(uint32_t);
  const bool fits = key_bytes + kStaticBytes <= shared_memory_limit();
  for_dtype(s.weight.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = fits ? prune_rows_kernel<T, true> : prune_rows_kernel<T, false>;
    launch(kernel, dim3(static_cast<unsigned>(s.weight.n_rows)), threads_for(s.weight.n_cols), fits ? key_bytes : 0,
           context.stream, s, num_pruned, is_aligned<T>(s.weight));
  });
}

}  // namespace wanda
