// prune_matrix_ on the GPU: finds the exact order statistic of the whole matrix, without a sort and without waiting
// for the host, and prunes up to it.
//   1. Count the high 15 bits of every key. 16-bit weights without a scale have 15-bit keys: skip steps 3 and 4.
//   2. Find the bin that holds sorted position `rank`.
//   3. Count the low 16 bits of the keys in that bin.
//   4. Find the bin that holds the rest of `rank`: the threshold is complete.
//   5. Prune every key up to the threshold.
// A block counts in 16-bit counters, so that 2^15 of them take 64 KB (sm_89 has 99). They are added to the global ones
// before they can overflow.
#include "block.cuh"
#include "prune_at_most.cuh"

namespace wanda {
namespace {

using Count = unsigned long long;

constexpr int kHighBins = 1 << 15, kLowBins = 1 << 16, kLowBits = 16;
constexpr int kThreads = 512;  // with 1024, ptxas had 32 registers and spilled
// Blocks per multiprocessor whose 64 KB of counters fit.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kBlocksAtOnce = 3;
#else
constexpr int kBlocksAtOnce = 2;
#endif
constexpr int64_t kPieceColumns = 8192;
constexpr int64_t kMaxCount = 65535;  // of a 16-bit counter
constexpr int kMaxBlocks = 396;       // 3 for each of an H100's 132 multiprocessors: all that are resident at once
constexpr int kAtOnce = 2;            // pieces from which a thread has loads in flight

struct Scratch {
  Count high[kHighBins], low[kLowBins];  // `low` is neither cleared nor used for narrow keys
  Count rank_in_bin;                     // the position within the high bin
  uint32_t high_bin;                     // narrow keys: this is the threshold
  uint32_t threshold;                    // for prune_at_most
};

// The matrix is divided into pieces of rows, so that a row index is computed once per piece and not once per weight.
struct Pieces {
  int64_t per_row, total;

  __host__ __device__ explicit Pieces(const Matrix& matrix)
      : per_row((matrix.n_cols + kPieceColumns - 1) / kPieceColumns), total(per_row * matrix.n_rows) {}
};

// body(key) for each weight of a block's next kAtOnce pieces, beginning with `piece`.
template <typename T, bool kNarrow, typename Body>
__device__ void for_keys(const Selection& s, const Pieces& pieces, int64_t piece, bool aligned, const Body& body) {
  const T* weights[kAtOnce];
  int64_t row[kAtOnce];
  int begin[kAtOnce], end[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int64_t each = piece + i * static_cast<int64_t>(gridDim.x);
    // The usual case. A 64-bit division costs as much as a dozen weights.
    const bool is_row = pieces.per_row == 1;
    row[i] = is_row ? each : each / pieces.per_row;
    const int64_t first = is_row ? 0 : each % pieces.per_row * kPieceColumns, left = s.weight.n_cols - first;
    begin[i] = static_cast<int>(first);
    end[i] = begin[i] + static_cast<int>(left < kPieceColumns ? left : kPieceColumns);
    if (each >= pieces.total) end[i] = begin[i];
    weights[i] = row_of<T>(s.weight, row[i]);
  }
  for (int offset = threadIdx.x * kVector; offset < kPieceColumns; offset += kThreads * kVector) {
    Pack<T, kVector> packs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin[i] + offset < end[i]) packs[i].load(weights[i], begin[i] + offset, end[i], aligned);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int col = begin[i] + offset;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (col + j < end[i]) body(matrix_key<T, kNarrow>(s, packs[i].values[j], row[i], col + j));
      }
    }
  }
}

// Adds the block's counters to the global ones and clears them.
__device__ inline void flush(uint32_t* bins, Count* total) {
  __syncthreads();
  for (int word = threadIdx.x; word < kHighBins / 2; word += kThreads) {
    const uint32_t pair = bins[word];
    if (pair & 0xffff) atomicAdd(&total[2 * word], static_cast<Count>(pair & 0xffff));
    if (pair >> 16) atomicAdd(&total[2 * word + 1], static_cast<Count>(pair >> 16));
    bins[word] = 0;
  }
  __syncthreads();
}

template <typename T, bool kNarrow>
__global__ void __launch_bounds__(kThreads, kNarrow ? kBlocksAtOnce : 2)
    count_high_kernel(Selection s, Scratch* scratch, bool aligned) {
  uint32_t* bins = reinterpret_cast<uint32_t*>(dynamic_shared());  // two counters per word
  for (int word = threadIdx.x; word < kHighBins / 2; word += kThreads) bins[word] = 0;
  __syncthreads();
  const Pieces pieces(s.weight);
  const int64_t largest = kAtOnce * (s.weight.n_cols < kPieceColumns ? s.weight.n_cols : kPieceColumns);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kAtOnce;
  int64_t n_counted = 0;
  for (int64_t piece = blockIdx.x; piece < pieces.total; piece += stride) {
    if (n_counted + largest > kMaxCount) {
      flush(bins, scratch->high);
      n_counted = 0;
    }
    n_counted += largest;
    for_keys<T, kNarrow>(s, pieces, piece, aligned, [&](uint32_t key) {
      const uint32_t bin = kNarrow ? key : key >> kLowBits;
      atomicAdd(&bins[bin / 2], bin % 2 ? 1u << 16 : 1u);
    });
  }
  flush(bins, scratch->high);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) count_low_kernel(Selection s, Scratch* scratch, bool aligned) {
  const Pieces pieces(s.weight);
  const uint32_t high = scratch->high_bin;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kAtOnce;
  for (int64_t piece = blockIdx.x; piece < pieces.total; piece += stride) {
    for_keys<T, false>(s, pieces, piece, aligned, [&](uint32_t key) {
      if (key >> kLowBits == high) atomicAdd(&scratch->low[key & (kLowBins - 1)], Count{1});
    });
  }
}

// The bin that holds a sorted position, for counters in global memory.
//   1. Sum each thread's share of the bins. A warp reads one share at a time, so that neighbouring lanes read
//      neighbouring bins.
//   2. Find the share that holds the position.
//   3. One warp finds the bin within it.
template <int kBins>
__device__ BinOfRank<Count> find_bin(const Count* bins, Count position) {
  constexpr int kEach = kBins / kThreads, kPerLane = kEach / kWarp;
  __shared__ Count of_share[kThreads];
  __shared__ BinOfRank<Count> found;
  __shared__ int share;
  __shared__ Count before_share;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 4
  for (int i = 0; i < kWarp; ++i) {
    const Count* first = bins + (warp * kWarp + i) * kEach;
    Count sum = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sum += first[j * kWarp + lane];
    sum = inclusive_scan_of_warp(sum);
    if (lane == kWarp - 1) of_share[warp * kWarp + i] = sum;
  }
  __syncthreads();
  const Count sum = of_share[threadIdx.x], before = exclusive_scan_of_block(sum);
  if (before <= position && position < before + sum) {  // true of one thread
    share = threadIdx.x;
    before_share = before;
  }
  __syncthreads();
  if (warp == 0) {
    Count counted = before_share;
    for (int j = 0; j < kPerLane; ++j) {
      const int bin = share * kEach + j * kWarp + lane;
      const Count count = bins[bin], inclusive = counted + inclusive_scan_of_warp(count);
      if (inclusive - count <= position && position < inclusive) found = {bin, position - (inclusive - count), count};
      counted = __shfl_sync(kAllLanes, inclusive, kWarp - 1);
    }
  }
  __syncthreads();
  return found;
}

__global__ void __launch_bounds__(kThreads) find_high_kernel(Scratch* scratch, Count rank, uint32_t nan) {
  const BinOfRank<Count> found = find_bin<kHighBins>(scratch->high, rank);
  if (threadIdx.x != 0) return;
  scratch->high_bin = static_cast<uint32_t>(found.bin);
  scratch->rank_in_bin = found.rank;
  scratch->threshold = scratch->high_bin == nan ? kNone : scratch->high_bin;
}

__global__ void __launch_bounds__(kThreads) find_low_kernel(Scratch* scratch, uint32_t nan) {
  const BinOfRank<Count> found = find_bin<kLowBins>(scratch->low, scratch->rank_in_bin);
  if (threadIdx.x != 0) return;
  const uint32_t key = scratch->high_bin << kLowBits | static_cast<uint32_t>(found.bin);
  scratch->threshold = key == nan ? kNone : key;  // no score is <= NaN
}

template <typename T, bool kNarrow>
void prune_matrix_of(const Context& context, const Selection& s, int64_t rank) {
  Scratch* scratch = static_cast<Scratch*>(context.scratch);
  const bool aligned = is_aligned<T>(s.weight);
  const int64_t n_pieces = Pieces(s.weight).total;
  const dim3 counting(static_cast<unsigned>(n_pieces < kMaxBlocks ? n_pieces : kMaxBlocks));
  clear(scratch, kNarrow ? sizeof scratch->high : sizeof(Scratch), context.stream);
  launch(count_high_kernel<T, kNarrow>, counting, kThreads, kHighBins * sizeof(uint16_t), context.stream, s, scratch,
         aligned);
  launch(find_high_kernel, dim3(1), kThreads, 0, context.stream, scratch, static_cast<Count>(rank),
         kNarrow ? nan_key(T{}) : kNone);
  if (!kNarrow) {
    launch(count_low_kernel<T>, counting, kThreads, 0, context.stream, s, scratch, aligned);
    launch(find_low_kernel, dim3(1), kThreads, 0, context.stream, scratch, nan_key(float{}));
  }
  prune_at_most<T, kNarrow>(context, s, &scratch->threshold, 0);
}

}  // namespace

size_t matrix_scratch_bytes() { return sizeof(Scratch); }

void prune_matrix(const Context& context, const Selection& s, int64_t rank) {
  for_dtype(s.weight.dtype, [&](auto element) {
    using T = decltype(element);
    if (is_narrow<T> && s.root == nullptr && s.scale == nullptr) {
      prune_matrix_of<T, is_narrow<T>>(context, s, rank);
    } else {
      prune_matrix_of<T, false>(context, s, rank);
    }
  });
}

}  // namespace wanda
