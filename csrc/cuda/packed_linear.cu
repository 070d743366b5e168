// x weight^T + bias for packed rows on the GPU. A warp takes a row of the weight and all rows of x. A lane loads the
// bits of 32 columns, and the warp then goes through these 1024 columns, 64 at a time: two neighbouring columns a lane.
// A column's value is preceded in its row by as many values as there are bits before the column's own. Each lane adds
// its products in the order of columns, and the lanes' sums are added in a fixed order.
#include "block.cuh"

namespace wanda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kPair = 2, kStepColumns = kPair * kWarp, kWordColumns = 32, kChunkColumns = kWordColumns * kWarp;

template <typename T>
__device__ T rounded_to(float value);
template <>
__device__ inline float rounded_to<float>(float value) {
  return value;
}
template <>
__device__ inline Half rounded_to<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
// To nearest, ties to even. A NaN stays a NaN.
template <>
__device__ inline BFloat rounded_to<BFloat>(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest)};
}

// The bits of 32 columns from `col`, a multiple of 32, on. Columns past the last one have none.
__device__ inline uint32_t word_at(const uint8_t* bits, int64_t col, int64_t n_cols, bool aligned) {
  if (col >= n_cols) return 0;
  const int64_t left = n_cols - col;
  if (aligned && left >= kWordColumns) return __ldg(reinterpret_cast<const uint32_t*>(bits + col / 8));
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (8 * i < left) word |= uint32_t{bits[col / 8 + i]} << 8 * i;
  }
  return left >= kWordColumns ? word : word & ((1u << left) - 1);
}

template <typename T>
struct alignas(kPair * sizeof(T)) Pair {
  T values[kPair];
};

// Elements col and col + 1, in one load if `aligned`; zeros past the end.
template <typename T>
__device__ Pair<T> pair_at(const T* row, int64_t col, int64_t n_cols, bool aligned) {
  if (aligned && col < n_cols) return *reinterpret_cast<const Pair<T>*>(row + col);
  return {{col < n_cols ? row[col] : T{}, col + 1 < n_cols ? row[col + 1] : T{}}};
}

template <typename T, int kX>
__global__ void __launch_bounds__(kThreads) packed_linear_kernel(PackedLinear s, bool words, bool pairs) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= s.weight.n_rows) return;
  const int64_t n_cols = s.weight.n_cols, n_values = s.weight.n_values;
  const uint8_t* const bits = s.weight.bits + row * ((n_cols + 7) / 8);
  int64_t first = s.weight.offsets == nullptr ? row * s.weight.row_values : s.weight.offsets[row];
  // Bits and offsets that do not fit the values must not lead outside of them.
  first = first < 0 ? 0 : first < n_values ? first : n_values;
  const int64_t n_left = n_values - first;
  const T* const values = static_cast<const T*>(s.weight.values) + first;

  const T* x[kX];
  float sums[kX] = {};
#pragma unroll
  for (int i = 0; i < kX; ++i) x[i] = row_of<T>(s.x, i < s.x.n_rows ? i : s.x.n_rows - 1);

  int64_t before = 0;  // values of the row before the chunk
  for (int64_t chunk = 0; chunk < n_cols; chunk += kChunkColumns) {
    const uint32_t own = word_at(bits, chunk + lane * kWordColumns, n_cols, words);
    const int count = __popc(own), through = inclusive_scan_of_warp(count);
    const int of_chunk = __shfl_sync(kAllLanes, through, kWarp - 1);
    const int n_columns = n_cols - chunk < kChunkColumns ? static_cast<int>(n_cols - chunk) : kChunkColumns;
#pragma unroll 4
    for (int step = 0; step < n_columns; step += kStepColumns) {
      // Half a warp reads one word.
      const int holder = step / kWordColumns + lane / (kWordColumns / kPair), bit = lane * kPair % kWordColumns;
      const uint32_t word = __shfl_sync(kAllLanes, own, holder);
      const int preceding = __shfl_sync(kAllLanes, through - count, holder);
      int64_t place = before + preceding + __popc(word & ((1u << bit) - 1));
      const int64_t col = chunk + step + lane * kPair;
      Pair<T> own_x[kX];
#pragma unroll
      for (int i = 0; i < kX; ++i) own_x[i] = pair_at(x[i], col, n_cols, pairs);
#pragma unroll
      for (int j = 0; j < kPair; ++j) {
        // A pruned weight adds nothing, even if x is infinite there.
        if ((word >> (bit + j) & 1) == 0 || place >= n_left) continue;
        const float value = to_float(values[place++]);
#pragma unroll
        for (int i = 0; i < kX; ++i) sums[i] = fmaf(value, to_float(own_x[i].values[j]), sums[i]);
      }
    }
    before += of_chunk;
  }
#pragma unroll
  for (int i = 0; i < kX; ++i) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sums[i] += __shfl_xor_sync(kAllLanes, sums[i], distance);
    }
    if (lane != 0 || i >= s.out.n_rows) continue;
    const float bias = s.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(s.bias)[row]);
    row_of<T>(s.out, i)[row] = rounded_to<T>(sums[i] + bias);
  }
}

template <typename T>
void launch_for(const Context& context, const PackedLinear& s) {
  // Whether a row's bits can be read in words of 32, and x in pairs.
  const bool words = reinterpret_cast<uintptr_t>(s.weight.bits) % 4 == 0 && (s.weight.n_cols + 7) / 8 % 4 == 0;
  const bool pairs = reinterpret_cast<uintptr_t>(s.x.data) % sizeof(Pair<T>) == 0 && s.x.stride % kPair == 0 &&
                     s.x.n_cols % kPair == 0;
  const dim3 grid(static_cast<unsigned>((s.weight.n_rows + kWarps - 1) / kWarps));
  const auto kernel = s.x.n_rows == 1   ? packed_linear_kernel<T, 1>
                      : s.x.n_rows == 2 ? packed_linear_kernel<T, 2>
                      : s.x.n_rows <= 4 ? packed_linear_kernel<T, 4>
                                        : packed_linear_kernel<T, kPackedLinearRows>;
  launch(kernel, grid, kThreads, 0, context.stream, s, words, pairs);
}

}  // namespace

void packed_linear(const Context& context, const PackedLinear& s) {
  if (s.weight.n_rows == 0) return;
  for_dtype(s.x.dtype, [&](auto element) { launch_for<decltype(element)>(context, s); });
}

}  // namespace wanda
