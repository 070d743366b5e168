// add_sq_norm_ on the GPU: acc[j] += sum_t x[t, j]^2 in two stages, no atomics, the same bits on every run.
//
// Stage 1 reads x once: a lane owns 8 neighbouring columns, the 8 warps of a block take turns at the tokens of a slab,
// and shared memory joins them. Stage 2 adds a column's slabs in order, in fp64. Slabs depend on the shape alone.
#include "block.cuh"

namespace wanda {
namespace {

constexpr int kVector = 8, kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kTileColumns = kVector * kWarp;
constexpr int64_t kMinSlabTokens = 256, kMaxSlabs = 128;

int64_t n_slabs(const Matrix& x) {
  const int64_t slabs = (x.n_rows + kMinSlabTokens - 1) / kMinSlabTokens;
  return slabs < kMaxSlabs ? slabs : kMaxSlabs;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_slab_kernel(Matrix x, int64_t slab_tokens, float* partial,
                                                            bool aligned) {
  __shared__ float of_warp[kWarps][kTileColumns];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTileColumns, col = tile + lane * kVector;
  const int64_t begin = blockIdx.y * slab_tokens;
  const int64_t end = begin + slab_tokens < x.n_rows ? begin + slab_tokens : x.n_rows;
  float sums[kVector] = {};
  for (int64_t token = begin + warp; token < end && col < x.n_cols; token += kWarps) {
    Pack<T, kVector> pack;
    pack.load(row_of<T>(x, token), col, x.n_cols, aligned);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float value = to_float(pack.values[i]);
      sums[i] = fmaf(value, value, sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) of_warp[warp][lane * kVector + i] = sums[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTileColumns && tile + i < x.n_cols; i += kThreads) {
    float sum = 0;
    for (int each = 0; each < kWarps; ++each) sum += of_warp[each][i];
    partial[blockIdx.y * x.n_cols + tile + i] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) add_slabs_kernel(const float* partial, int64_t slabs, int64_t n_cols,
                                                             float* acc) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (col >= n_cols) return;
  double sum = acc[col];
  for (int64_t slab = 0; slab < slabs; ++slab) sum += partial[slab * n_cols + col];
  acc[col] = static_cast<float>(sum);
}

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

}  // namespace

size_t sq_norm_scratch_bytes(const Matrix& x) { return n_slabs(x) * x.n_cols * sizeof(float); }

void add_sq_norm(const Context& context, const Matrix& x, float* acc) {
  const int64_t slabs = n_slabs(x), slab_tokens = (x.n_rows + slabs - 1) / slabs;
  float* partial = static_cast<float*>(context.scratch);
  for_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    launch(sum_slab_kernel<T>, dim3(blocks(x.n_cols, kTileColumns), static_cast<unsigned>(slabs)), kThreads, 0,
           context.stream, x, slab_tokens, partial, is_aligned<T>(x));
  });
  launch(add_slabs_kernel, dim3(blocks(x.n_cols, kThreads)), kThreads, 0, context.stream,
         static_cast<const float*>(partial), slabs, x.n_cols, acc);
}

}  // namespace wanda
