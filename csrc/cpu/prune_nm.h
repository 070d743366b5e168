// Keep the n best of every m consecutive columns, m <= 32.
//
// m = 2, 4, 8, 16 within a vector: a key's rank is counted against the m - 1 rotations of its group.
// Any other m: kWidth groups side by side, one a lane; a sorting network finds the threshold of all of them at once.
#pragma once

#include "rows.h"

namespace WANDA_ISA {

template <int M>
struct Rotations {
  Simd::Int index[M], earlier[M];  // rotation r: the lane to look at, and 1 where it is the lower column

  Rotations() {
    for (int r = 1; r < M; ++r) {
      int32_t lanes[kWidth], flags[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) {
        const int partner = lane / M * M + (lane + r) % M;
        lanes[lane] = partner;
        flags[lane] = partner < lane;
      }
      index[r] = Simd::load(lanes);
      earlier[r] = Simd::load(flags);
    }
  }
};

// pruned: where fewer than m - n of the group come before this one in (key, column).
template <int M>
void mark_by_rotation(const int32_t* keys, int64_t padded, int n, uint8_t* pruned) {
  const Rotations<M> rotations;
  const Simd::Int num_pruned = Simd::broadcast(M - n);
  for (int64_t col = 0; col < padded; col += kWidth) {
    const Simd::Int key = Simd::load(keys + col);
    Simd::Int rank = Simd::broadcast(0);
    for (int r = 1; r < M; ++r) {
      // One less makes an equal key of a lower column come first.
      const Simd::Int other = Simd::subtract(Simd::permute(key, rotations.index[r]), rotations.earlier[r]);
      rank = Simd::increment_where(Simd::less(other, key), rank);
    }
    store_bits(pruned, col, Simd::to_bits(Simd::less(rank, num_pruned)));
  }
}

// Batcher's merge exchange for any m (Knuth, volume 3, 5.2.2 M): 191 comparisons for m = 32.
struct Network {
  uint8_t first[200], second[200];
  int size = 0;

  explicit Network(int m) {
    int top = 1;
    while (2 * top < m) top *= 2;
    for (int p = top; p > 0; p /= 2) {
      int q = top, r = 0, distance = p;
      while (true) {
        for (int i = 0; i + distance < m; ++i) {
          if ((i & p) != r) continue;
          first[size] = static_cast<uint8_t>(i);
          second[size++] = static_cast<uint8_t>(i + distance);
        }
        if (q == p) break;
        distance = q - p;
        q /= 2;
        r = p;
      }
    }
  }
};

// One word a lane: bit j = column j of that lane's group is pruned.
inline Simd::Int mark_groups(const int32_t* keys, int n, int m, const Network& network) {
  int32_t lanes[kWidth];
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane * m;
  const Simd::Int first = Simd::load(lanes);
  Simd::Int key[wanda::cpu::kMaxGroup], sorted[wanda::cpu::kMaxGroup];
  for (int j = 0; j < m; ++j) key[j] = sorted[j] = Simd::gather(keys + j, first);
  for (int i = 0; i < network.size; ++i) {
    const Simd::Int a = sorted[network.first[i]], b = sorted[network.second[i]];
    sorted[network.first[i]] = Simd::min(a, b);
    sorted[network.second[i]] = Simd::max(a, b);
  }
  // Those below the threshold go, then the first of those equal to it until m - n are gone.
  const Simd::Int threshold = sorted[m - n - 1], num_pruned = Simd::broadcast(m - n);
  Simd::Int gone = Simd::broadcast(0), pruned = gone;
  for (int j = 0; j < m; ++j) gone = Simd::increment_where(Simd::less(key[j], threshold), gone);
  for (int j = 0; j < m; ++j) {
    const auto tied = Simd::both(Simd::equal(key[j], threshold), Simd::less(gone, num_pruned));
    gone = Simd::increment_where(tied, gone);
    const auto low = Simd::either(Simd::less(key[j], threshold), tied);
    pruned = Simd::add_where(low, pruned, Simd::broadcast(static_cast<int32_t>(1u << j)));
  }
  return pruned;
}

inline void mark_by_network(const int32_t* keys, int64_t n_groups, int n, int m, uint8_t* pruned) {
  const Network network(m);
  uint64_t pending = 0;  // bits of the row not yet written
  int n_pending = 0;
  for (int64_t group = 0; group < n_groups; group += kWidth) {
    int32_t words[kWidth];
    Simd::store(words, mark_groups(keys + group * m, n, m, network));
    const int64_t n_lanes = smaller<int64_t>(kWidth, n_groups - group);
    for (int lane = 0; lane < n_lanes; ++lane) {
      pending |= uint64_t{static_cast<uint32_t>(words[lane])} << n_pending;
      n_pending += m;
      for (; n_pending >= 8; n_pending -= 8, pending >>= 8) *pruned++ = static_cast<uint8_t>(pending);
    }
  }
  memcpy(pruned, &pending, sizeof pending);
}

inline void mark_nm(const int32_t* keys, int64_t n_cols, int n, int m, uint8_t* pruned) {
  const int64_t padded = round_up(n_cols, kWidth);
  if (m == 2) return mark_by_rotation<2>(keys, padded, n, pruned);
  if (m == 4) return mark_by_rotation<4>(keys, padded, n, pruned);
  if (m == 8) return mark_by_rotation<8>(keys, padded, n, pruned);
  if (m == 16 && kWidth == 16) return mark_by_rotation<kWidth>(keys, padded, n, pruned);
  mark_by_network(keys, n_cols / m, n, m, pruned);
}

inline void prune_nm(const Selection& s, int n, int m, int64_t begin, int64_t end, void* memory) {
  const int64_t n_cols = s.weight.n_cols;
  const int64_t padded = round_up(n_cols, kWidth * m);  // whole vectors of groups
  const Scratch scratch(memory, n_cols);
  for (int64_t row = begin; row < end; ++row) {
    row_keys(s, row, padded, scratch.keys);
    mark_nm(scratch.keys, n_cols, n, m, scratch.pruned);
    apply_row(s, row, scratch.pruned);
  }
}

}  // namespace WANDA_ISA
