// prune_rows_ on the GPU, for all matrices of a stack in one launch. One block prunes one row, which is read once and
// written once: weights and keys stay in registers. If a row is too long for that, or does not consist of whole 16-byte
// vectors, its keys are in shared memory. If they do not fit there, each pass computes them again from L2.
#include "row_keys.cuh"

namespace wanda {
namespace {

constexpr int kFewThreads = 512, kManyThreads = 1024, kMostVectors = 4;

// Ask for two resident blocks per multiprocessor if registers allow it, else for one.
template <typename T, int kVectors, int kThreads>
constexpr int blocks_for = kThreads == kFewThreads && kVectors * (kVector + Words<T>::kChunks * 4) <= 36 ? 2 : 1;

// The block's row, numbered through all matrices, as row 0 of a selection in it alone, without the mask.
template <typename T>
__device__ Selection row_of_block(const StackSelection& s) {
  const Stack& stack = s.weight;
  const uint32_t n_rows = static_cast<uint32_t>(stack.n_rows);
  const int64_t matrix = blockIdx.x / n_rows, row = blockIdx.x % n_rows;
  T* weights = static_cast<T*>(stack.data) + matrix * stack.matrix_stride + row * stack.row_stride;
  Selection part = {{weights, stack.dtype, 1, stack.n_cols, 0}, nullptr, nullptr, 0, nullptr};
  if (s.root != nullptr) part.root = s.root + matrix * stack.n_cols;
  if (s.scale != nullptr) part.scale = s.scale + matrix * s.scale_matrix_stride + row * s.scale_row_stride;
  return part;
}

// Computed where it is used: it would take registers through the search.
__device__ inline uint8_t* mask_of_block(const StackSelection& s) {
  return s.mask + static_cast<int64_t>(blockIdx.x) * ((s.weight.n_cols + 7) / 8);
}

// For rows of whole vectors.
template <typename T, int kVectors, Scale kScale, int kThreads>
__global__ void __launch_bounds__(kThreads, blocks_for<T, kVectors, kThreads>)
    prune_rows_kernel(StackSelection stack, uint32_t num_pruned) {
  __shared__ Search search;
  const Selection s = row_of_block<T>(stack);
  const uint32_t n_cols = static_cast<uint32_t>(stack.weight.n_cols);
  T* weights = static_cast<T*>(s.weight.data);
  constexpr bool kHoldsWeights = kThreads == kFewThreads;  // otherwise weights are read again from L2
  RegisterKeys<T, kVectors, kScale, kHoldsWeights> keys;
  if constexpr (kHoldsWeights) keys.load(weights, n_cols);
  clear_bins(search);  // overlaps with the loads of the weights
  const float* factors = kScale == Scale::kMatrix ? s.scale : s.root;
  const uint32_t highest = keys.compute(weights, factors, n_cols);
  const Threshold threshold = find_threshold(search, keys, highest, n_cols, num_pruned);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t col = keys.column(v);
    if (col >= n_cols) continue;
    unsigned pruned = 0;
    // Without ties at the threshold, keys alone decide.
    if (threshold.column == 0) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) pruned |= static_cast<unsigned>(keys.keys[v][i] < threshold.key) << i;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        pruned |= static_cast<unsigned>(threshold.prunes(keys.keys[v][i], col + i)) << i;
      }
    }
    if constexpr (!kHoldsWeights) keys.weights[v].load(weights + col);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (pruned >> i & 1) keys.weights[v].clear(i);
    }
    keys.weights[v].store(weights + col);
    if (stack.mask != nullptr) mask_of_block(stack)[col / kVector] = static_cast<uint8_t>(~pruned);
  }
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kManyThreads) prune_long_rows_kernel(StackSelection stack, uint32_t num_pruned) {
  __shared__ Search search;
  const Selection s = row_of_block<T>(stack);
  const int64_t n_cols = s.weight.n_cols;
  LongKeys<T, kShared> keys = {s, 0, kShared ? reinterpret_cast<uint32_t*>(dynamic_shared()) : nullptr};
  clear_bins(search);
  const Threshold threshold = find_threshold(search, keys, keys.compute(), static_cast<uint32_t>(n_cols), num_pruned);
  T* weights = static_cast<T*>(s.weight.data);
#pragma unroll 1
  for (int64_t byte = threadIdx.x; byte < (n_cols + 7) / 8; byte += blockDim.x) {
    unsigned kept = 0;
#pragma unroll 1
    for (int i = 0; i < 8 && byte * 8 + i < n_cols; ++i) {
      const uint32_t col = static_cast<uint32_t>(byte * 8 + i);
      const bool prunes = threshold.prunes(keys.key(col), col);
      if (prunes) weights[col] = T{};
      kept |= static_cast<unsigned>(!prunes) << i;
    }
    if (stack.mask != nullptr) mask_of_block(stack)[byte] = static_cast<uint8_t>(kept);
  }
}

int vectors_for(int64_t n_cols) {
  if (n_cols <= 512) return 1;
  if (n_cols <= 8192) return 2;
  return n_cols <= 12288 ? 3 : 4;
}

dim3 block_for_each_row(const Stack& stack) { return dim3(static_cast<unsigned>(stack.n_matrices * stack.n_rows)); }

template <typename T, int kVectors, int kThreads = kFewThreads>
void prune_in_registers(const Context& context, const StackSelection& s, uint32_t num_pruned) {
  const int64_t per_warp = int64_t{kWarp} * kVectors * kVector;
  const int n_threads = static_cast<int>((s.weight.n_cols + per_warp - 1) / per_warp) * kWarp;
  auto kernel = prune_rows_kernel<T, kVectors, Scale::kNone, kThreads>;
  if (s.root != nullptr) kernel = prune_rows_kernel<T, kVectors, Scale::kVector, kThreads>;
  if (s.scale != nullptr) kernel = prune_rows_kernel<T, kVectors, Scale::kMatrix, kThreads>;
  launch(kernel, block_for_each_row(s.weight), n_threads, 0, context.stream, s, num_pruned);
}

template <typename T>
void prune_long(const Context& context, const StackSelection& s, uint32_t num_pruned) {
  const size_t key_bytes = s.weight.n_cols * sizeof(uint32_t);
  const bool fits = key_bytes + kMostStaticBytes <= shared_memory_limit();
  const int n_threads = s.weight.n_cols <= 2048 ? 128 : s.weight.n_cols <= 16384 ? 512 : kManyThreads;
  const auto kernel = fits ? prune_long_rows_kernel<T, true> : prune_long_rows_kernel<T, false>;
  launch(kernel, block_for_each_row(s.weight), n_threads, fits ? key_bytes : 0, context.stream, s, num_pruned);
}

// Whether every vector of a row, and of its root or scale, is whole and aligned to 16 bytes.
template <typename T>
bool is_whole(const StackSelection& s) {
  const auto is_aligned = [](const void* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; };
  const auto are_aligned = [](int64_t matrix_stride, int64_t row_stride, int64_t size) {
    return matrix_stride * size % 16 == 0 && row_stride * size % 16 == 0;
  };
  return s.weight.n_cols % kVector == 0 && is_aligned(s.weight.data) && is_aligned(s.root) && is_aligned(s.scale) &&
         are_aligned(s.weight.matrix_stride, s.weight.row_stride, sizeof(T)) &&
         are_aligned(s.scale_matrix_stride, s.scale_row_stride, sizeof(float));
}

}  // namespace

void prune_rows(const Context& context, const StackSelection& s, int64_t num_pruned) {
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
