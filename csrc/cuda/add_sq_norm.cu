// add_sq_norm_ on the GPU: acc[j] += sum_t x[t, j]^2 in two stages, without atomics, so every run gives the same bits.
//   1. Sum slabs of tokens in fp32. x is read once: a lane owns 8 neighbouring columns, the 8 warps of a block take
//      turns at the slab's tokens, and their sums are added in shared memory.
//   2. Add a column's slabs in a fixed order, in fp64.
// The slabs depend on the shape alone. With segments, a slab has consecutive tokens, and its block writes a row of
// partial sums for each expert with tokens in it. The row's number is slab + expert: no two such pairs share one.
#include "block.cuh"

namespace wanda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kTileColumns = kVector * kWarp;
constexpr int kAtOnce = 4;  // loads that a thread has in flight
constexpr int64_t kBlocks = 528, kMaxSlabs = 256;  // 4 blocks for each of an H100's 132 multiprocessors

// A lot is the tokens that a block loads at once. Slab i takes lots i, i + n_slabs, ..., so that slabs differ by at
// most one lot.
int64_t n_slabs(const Matrix& x) {
  const int64_t lots = (x.n_rows + kWarps * kAtOnce - 1) / (kWarps * kAtOnce);
  const int64_t tiles = (x.n_cols + kTileColumns - 1) / kTileColumns;
  int64_t most = tiles < kBlocks ? kBlocks / tiles : 1;
  if (most > kMaxSlabs) most = kMaxSlabs;
  return lots < most ? lots : most;
}

constexpr int64_t kLot = kWarps * kAtOnce;

// target[col] = the sum of squares over the lots at first, first + step, ... before `end`, for the block's columns.
template <typename T>
__device__ void sum_lots(const Matrix& x, int64_t first, int64_t end, int64_t step, bool aligned,
                         float (*of_warp)[kTileColumns], float* target) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTileColumns, col = tile + lane * kVector;
  float sums[kVector] = {};
  for (int64_t lot = first; lot < end && col < x.n_cols; lot += step) {
    Pack<T, kVector> packs[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t token = lot + i * kWarps + warp;
      if (token < end) packs[i].load(row_of<T>(x, token), col, x.n_cols, aligned);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float value = to_float(packs[i].values[j]);
        sums[j] = fmaf(value, value, sums[j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) of_warp[warp][lane * kVector + i] = sums[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTileColumns && tile + i < x.n_cols; i += kThreads) {
    float sum = 0;
    for (int each = 0; each < kWarps; ++each) sum += of_warp[each][i];
    target[tile + i] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_slab_kernel(Matrix x, float* partial, bool aligned) {
  __shared__ float of_warp[kWarps][kTileColumns];
  sum_lots<T>(x, blockIdx.y * kLot, x.n_rows, gridDim.y * kLot, aligned, of_warp, partial + blockIdx.y * x.n_cols);
}

struct Range {
  int64_t first, end;
};

// The rows of an expert, within the matrix whatever the offsets are.
__device__ inline Range rows_of(const Segments& s, int64_t expert, int64_t n_rows) {
  const int64_t first = s.offsets[expert], end = s.offsets[expert + 1];
  return {first > 0 ? first : 0, end < n_rows ? end : n_rows};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_segments_kernel(Matrix x, Segments s, int64_t slab_tokens, float* partial, bool aligned) {
  __shared__ float of_warp[kWarps][kTileColumns];
  const int64_t begin = blockIdx.y * slab_tokens;
  const int64_t stop = begin + slab_tokens < x.n_rows ? begin + slab_tokens : x.n_rows;
  // the first expert that ends behind the slab's first token
  int64_t expert = 0;
  for (int64_t high = s.n; expert < high;) {
    const int64_t middle = (expert + high) / 2;
    if (s.offsets[middle + 1] > begin) high = middle;
    else expert = middle + 1;
  }
  for (; expert < s.n && s.offsets[expert] < stop; ++expert) {
    const Range rows = rows_of(s, expert, x.n_rows);
    const int64_t first = rows.first > begin ? rows.first : begin, end = rows.end < stop ? rows.end : stop;
    if (first >= end) continue;
    __syncthreads();  // of_warp may still be read for the expert before
    sum_lots<T>(x, first, end, kLot, aligned, of_warp, partial + (blockIdx.y + expert) * x.n_cols);
  }
}

// Each warp adds every kWarps-th slab of 32 columns.
__device__ void add_slabs(const float* partial, int64_t slabs, int64_t n_cols, double (*of_warp)[kWarp], float* acc) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double sum = 0;
#pragma unroll 4
  for (int64_t slab = warp; slab < slabs && col < n_cols; slab += kWarps) sum += partial[slab * n_cols + col];
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || col >= n_cols) return;
  double total = acc[col];
  for (int each = 0; each < kWarps; ++each) total += of_warp[each][lane];
  acc[col] = static_cast<float>(total);
}

__global__ void __launch_bounds__(kThreads) add_slabs_kernel(const float* partial, int64_t slabs, int64_t n_cols,
                                                             float* acc) {
  __shared__ double of_warp[kWarps][kWarp];
  add_slabs(partial, slabs, n_cols, of_warp, acc);
}

__global__ void __launch_bounds__(kThreads) add_segments_kernel(const float* partial, Matrix x, Segments s,
                                                                int64_t slab_tokens, Matrix acc) {
  __shared__ double of_warp[kWarps][kWarp];
  const int64_t expert = blockIdx.y;
  const Range rows = rows_of(s, expert, x.n_rows);
  if (rows.first >= rows.end) return;
  const int64_t first = rows.first / slab_tokens, last = (rows.end - 1) / slab_tokens;
  add_slabs(partial + (first + expert) * x.n_cols, last - first + 1, x.n_cols, of_warp, row_of<float>(acc, expert));
}

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

}  // namespace

size_t sq_norm_scratch_bytes(const Matrix& x) { return n_slabs(x) * x.n_cols * sizeof(float); }

void add_sq_norm(const Context& context, const Matrix& x, float* acc) {
  const int64_t slabs = n_slabs(x);
  float* partial = static_cast<float*>(context.scratch);
  for_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    launch(sum_slab_kernel<T>, dim3(blocks(x.n_cols, kTileColumns), static_cast<unsigned>(slabs)), kThreads, 0,
           context.stream, x, partial, is_aligned<T>(x));
  });
  launch(add_slabs_kernel, dim3(blocks(x.n_cols, kWarp)), kThreads, 0, context.stream,
         static_cast<const float*>(partial), slabs, x.n_cols, acc);
}

size_t sq_norm_segments_scratch_bytes(const Matrix& x, const Segments& s) {
  return (n_slabs(x) + s.n) * x.n_cols * sizeof(float);
}

void add_sq_norm_segments(const Context& context, const Matrix& x, const Segments& s, const Matrix& acc) {
  const int64_t slab_tokens = (x.n_rows + n_slabs(x) - 1) / n_slabs(x);
  const int64_t slabs = (x.n_rows + slab_tokens - 1) / slab_tokens;
  float* partial = static_cast<float*>(context.scratch);
  for_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    launch(sum_segments_kernel<T>, dim3(blocks(x.n_cols, kTileColumns), static_cast<unsigned>(slabs)), kThreads, 0,
           context.stream, x, s, slab_tokens, partial, is_aligned<T>(x));
  });
  launch(add_segments_kernel, dim3(blocks(x.n_cols, kWarp), static_cast<unsigned>(s.n)), kThreads, 0, context.stream,
         static_cast<const float*>(partial), x, s, slab_tokens, acc);
}

}  // namespace wanda
