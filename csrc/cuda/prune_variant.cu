// prune_variant_ on the GPU: per row, prune the smallest scores while their sum stays within alpha of the row's sum.
// Alpha is bisected until the matrix has the wanted ratio.
//   1. Sort each row's keys into 512 bins, 32 per octave, and store the mass of the keys below each bin.
//   2. For each alpha, a warp finds the bin that a row's limit falls into, and then the threshold among that bin's
//      keys.
//   3. Prune every key up to its row's threshold.
// The host does not wait for results. Each of the eleven launches of step 2 stores the number of pruned weights, and
// the next launch replays the bisection from these counts. When alpha has settled, later launches return at once.
// Masses are the reference's fixed-point integers, whose sums are exact in any order.
#include "block.cuh"
#include "prune_at_most.cuh"

namespace wanda {
namespace {

using Count = unsigned long long;

constexpr int kBins = 512, kWindowShift = 18;  // 32 bins per octave, for 16 octaves below the row's largest key
constexpr uint32_t kWindow = (uint32_t{kBins} << kWindowShift) - 1;
constexpr int kOrderThreads = kBins, kFindThreads = 256, kRowsPerBlock = kFindThreads / kWarp;
constexpr int kRounds = 11;  // the most alphas: 0.8 / 2^10 is the first interval below 0.001
// The mass of a score that overflowed is that of the largest finite score.
constexpr uint32_t kLargestFinite = 0x7f7fffff;

struct Bin {
  int64_t mass_before;  // of all keys of the row in lower bins
  uint32_t n_before;
};

// A row's bins begin at `low`. Keys below that are in the first bin.
struct Row {
  int64_t mass;
  uint32_t low, highest;

  __device__ int bin_of(uint32_t key) const { return static_cast<int>((max(key, low) - low) >> kWindowShift); }
  __device__ uint32_t first_key(int bin) const {
    return bin == 0 ? 0 : low + (static_cast<uint32_t>(bin) << kWindowShift);
  }
};

// Device memory of one call.
struct Scratch {
  Count* counts;         // [kRounds]: pruned at that round's alpha
  Row* rows;             // [n_rows]
  Bin* bins;             // [n_rows, kBins]
  uint32_t* keys;        // [n_rows, n_cols], sorted by bin
  uint32_t* thresholds;  // [n_rows]: keys up to them are pruned

  static size_t bytes(const Matrix& weight) {
    const int64_t of_row = sizeof(Row) + kBins * sizeof(Bin) + (weight.n_cols + 1) * sizeof(uint32_t);
    return kCountBytes + weight.n_rows * of_row;
  }
  Scratch(void* memory, const Matrix& weight)
      : counts(static_cast<Count*>(memory)),
        rows(reinterpret_cast<Row*>(static_cast<char*>(memory) + kCountBytes)),
        bins(reinterpret_cast<Bin*>(rows + weight.n_rows)),
        keys(reinterpret_cast<uint32_t*>(bins + weight.n_rows * kBins)),
        thresholds(keys + weight.n_rows * weight.n_cols) {}

  static constexpr size_t kCountBytes = 128;
};

// mass = floor(score * 2^(fraction_bits - E)), where 2^(E-1) <= the row's largest score < 2^E and E >= -125.
struct FixedPoint {
  int shift_of_zero;

  __device__ FixedPoint(uint32_t highest, int fraction_bits)
      : shift_of_zero(fraction_bits - 24 - max(static_cast<int>(min(highest, kLargestFinite) >> 23), 1)) {}
  __device__ int64_t mass(uint32_t key) const {
    key = min(key, kLargestFinite);
    const int exponent = static_cast<int>(key >> 23), shift = shift_of_zero + max(exponent, 1);
    const uint32_t mantissa = (key & 0x7fffff) | (exponent > 0 ? 1u << 23 : 0);
    return shift >= 0 ? static_cast<int64_t>(mantissa) << shift : mantissa >> min(-shift, 31);
  }
};

int fraction_bits(int64_t n_cols) {
  int length = 1;  // bits of n_cols - 1
  while ((n_cols - 1) >> length) ++length;
  return length > 17 ? 53 - length : 36;
}

// Keys are sorted in shared memory if kShared, otherwise in scratch.keys.
template <typename T, bool kShared>
__global__ void __launch_bounds__(kOrderThreads) order_keys_kernel(Selection s, Scratch scratch, int fraction_bits) {
  __shared__ uint32_t next[kBins], of_warp[kWarp];
  const int64_t row = blockIdx.x, n_cols = s.weight.n_cols;
  const T* weights = row_of<T>(s.weight, row);
  uint32_t* stored = scratch.keys + row * n_cols;
  uint32_t* keys = kShared ? reinterpret_cast<uint32_t*>(dynamic_shared()) : stored;
  const auto for_keys = [&](const auto& body) {
    for (int64_t col = threadIdx.x; col < n_cols; col += kOrderThreads) body(key_of(s, weights[col], row, col));
  };

  uint32_t highest = 0;
  for_keys([&](uint32_t key) { highest = max(highest, key); });
  next[threadIdx.x] = 0;
  highest = max_of_block(of_warp, highest);
  const Row about = {0, highest > kWindow ? highest - kWindow : 0, highest};
  for_keys([&](uint32_t key) { atomicAdd(&next[about.bin_of(key)], 1u); });
  __syncthreads();
  const uint32_t count = next[threadIdx.x], begin = exclusive_scan_of_block(count);
  next[threadIdx.x] = begin;
  __syncthreads();
  for_keys([&](uint32_t key) { keys[atomicAdd(&next[about.bin_of(key)], 1u)] = key; });
  __syncthreads();

  const FixedPoint fixed_point(highest, fraction_bits);
  int64_t mass = 0;  // of this thread's bin
  for (uint32_t i = begin; i < begin + count; ++i) mass += fixed_point.mass(keys[i]);
  const int64_t before = exclusive_scan_of_block(mass);
  scratch.bins[row * kBins + threadIdx.x] = {before, begin};
  if (threadIdx.x == kBins - 1) scratch.rows[row] = {before + mass, about.low, highest};
  if (!kShared) return;
  for (int64_t i = threadIdx.x; i < n_cols; i += kOrderThreads) stored[i] = keys[i];
}

struct Bisection {
  double alpha;
  bool has_settled;
};

// The state of the bisection after n_rounds, with the same steps as the reference.
__device__ inline Bisection replay(const Count* counts, int n_rounds, double numel, double ratio) {
  double low = 0, alpha = 0.4, high = 0.8;
  for (int i = 0; i < n_rounds; ++i) {
    const double sparsity = static_cast<double>(counts[i]) / numel;
    if (fabs(sparsity - ratio) <= 0.001 || high - low < 0.001) return {alpha, true};
    (sparsity > ratio ? high : low) = alpha;
    alpha = (low + high) / 2;
  }
  return {alpha, false};
}

__device__ inline int64_t sum_of_warp(int64_t value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Whether the mass of all lower keys plus the key's own is within the limit: true up to some key, then false.
struct MassLimit {
  const FixedPoint& fixed_point;
  int64_t limit;
  __device__ bool holds(uint32_t key, int64_t mass_below) const { return mass_below + fixed_point.mass(key) <= limit; }
};

// The last bin whose first key is within the limit. Called by one warp.
__device__ inline int bin_within(const Row& about, const Bin* bins, const MassLimit& limit) {
  constexpr int kCoarse = kBins / kWarp;
  const int lane = threadIdx.x % kWarp;
  const auto is_within = [&](int bin) { return limit.holds(about.first_key(bin), bins[bin].mass_before); };
  const int group = __popc(__ballot_sync(kAllLanes, is_within(lane * kCoarse))) - 1;
  return group * kCoarse + __popc(__ballot_sync(kAllLanes, lane < kCoarse && is_within(group * kCoarse + lane))) - 1;
}

// One warp finds the threshold of one row.
__global__ void __launch_bounds__(kFindThreads)
    find_thresholds_kernel(Matrix weight, Scratch scratch, int fraction_bits, int this_round, double ratio) {
  __shared__ Bisection bisection;
  __shared__ uint32_t pruned_of_warp[kRowsPerBlock];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const double numel = static_cast<double>(weight.n_rows * weight.n_cols);
  if (threadIdx.x == 0) bisection = replay(scratch.counts, this_round, numel, ratio);
  __syncthreads();
  if (bisection.has_settled) return;

  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + warp;
  uint32_t n_pruned = 0;
  if (row < weight.n_rows) {
    const Row about = scratch.rows[row];
    const Bin* bins = scratch.bins + row * kBins;
    const uint32_t* keys = scratch.keys + row * weight.n_cols;
    const FixedPoint fixed_point(about.highest, fraction_bits);
    const MassLimit limit = {fixed_point, static_cast<int64_t>(static_cast<double>(about.mass) * bisection.alpha)};
    const int bin = bin_within(about, bins, limit);
    const uint32_t begin = bins[bin].n_before;
    const uint32_t end = bin + 1 < kBins ? bins[bin + 1].n_before : static_cast<uint32_t>(weight.n_cols);
    uint32_t low = about.first_key(bin), high = bin + 1 < kBins ? about.first_key(bin + 1) : about.highest + 1;
    uint32_t n_low = begin, n_high = end;  // number of keys up to `low`, and of keys below `high`
    for (uint32_t i = begin; i < end; i += kWarp) {
      n_low += __popc(__ballot_sync(kAllLanes, i + lane < end && keys[i + lane] <= low));
    }
    while (high - low > 1 && n_low < n_high) {
      const uint32_t middle = low + (high - low) / 2;
      int64_t mass = 0;
      uint32_t n_below = 0, n_equal = 0;
      for (uint32_t i = begin + lane; i < end; i += kWarp) {
        const uint32_t key = keys[i];
        mass += key < middle ? fixed_point.mass(key) : 0;
        n_below += key < middle, n_equal += key == middle;
      }
      n_below = begin + __reduce_add_sync(kAllLanes, n_below);
      if (limit.holds(middle, bins[bin].mass_before + sum_of_warp(mass))) {
        low = middle, n_low = n_below + __reduce_add_sync(kAllLanes, n_equal);
      } else {
        high = middle, n_high = n_below;
      }
    }
    n_pruned = n_low;
    if (lane == 0) scratch.thresholds[row] = low;
  }
  if (lane == 0) pruned_of_warp[warp] = n_pruned;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Count of_block = 0;
  for (const uint32_t each : pruned_of_warp) of_block += each;
  atomicAdd(&scratch.counts[this_round], of_block);
}

__global__ void write_alpha_kernel(Scratch scratch, double numel, double ratio, double* alpha) {
  *alpha = replay(scratch.counts, kRounds, numel, ratio).alpha;
}

template <typename T>
void prune_variant_of(const Context& context, const Selection& s, double ratio, double* alpha) {
  const Scratch scratch(context.scratch, s.weight);
  const int bits = fraction_bits(s.weight.n_cols);
  const size_t key_bytes = s.weight.n_cols * sizeof(uint32_t);
  const bool fits = key_bytes + kMostStaticBytes <= shared_memory_limit();
  const auto order_keys = fits ? order_keys_kernel<T, true> : order_keys_kernel<T, false>;
  const int64_t n_blocks = (s.weight.n_rows + kRowsPerBlock - 1) / kRowsPerBlock;
  clear(scratch.counts, Scratch::kCountBytes, context.stream);
  launch(order_keys, dim3(static_cast<unsigned>(s.weight.n_rows)), kOrderThreads, fits ? key_bytes : 0, context.stream,
         s, scratch, bits);
  for (int round = 0; round < kRounds; ++round) {
    launch(find_thresholds_kernel, dim3(static_cast<unsigned>(n_blocks)), kFindThreads, 0, context.stream, s.weight,
           scratch, bits, round, ratio);
  }
  launch(write_alpha_kernel, dim3(1), 1, 0, context.stream, scratch,
         static_cast<double>(s.weight.n_rows * s.weight.n_cols), ratio, alpha);
  prune_at_most<T, false>(context, s, scratch.thresholds, 1);
}

}  // namespace

size_t variant_scratch_bytes(const Matrix& weight) { return Scratch::bytes(weight); }

void prune_variant(const Context& context, const Selection& s, double ratio, double* alpha) {
  for_dtype(s.weight.dtype, [&](auto element) { prune_variant_of<decltype(element)>(context, s, ratio, alpha); });
}

}  // namespace wanda
