// Keep the n best of every m consecutive columns, m <= 32.
//
// If m is 2, 4, 8 or 16 and fits a vector, each key is compared with the other m - 1 lanes of its group, and the
// weights are zeroed in the same pass. Any other m: each lane holds one group, and a sorting network finds the
// thresholds of kWidth groups at once.
#pragma once

#include <utility>

#include "rows.h"

namespace WANDA_ISA {

constexpr int highest_bit(int n) { return n < 2 ? n : 2 * highest_bit(n / 2); }

// The lanes that are pruned: the m - n smallest of each group, ordered by (key, column).
template <int M>
struct LowestOfGroup {
  Simd::Int num_pruned, later[M];  // later[b]: 1 in the lanes whose index has bit b set

  explicit LowestOfGroup(int n) : num_pruned(Simd::broadcast(M - n)) {
    for (int bit = 1; bit < M; bit *= 2) {
      int32_t lanes[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = (lane & bit) != 0;
      later[bit] = Simd::load(lanes);
    }
  }

  Simd::Mask operator()(Simd::Int key) const { return of(key, std::make_integer_sequence<int, M - 1>()); }

 private:
  template <int... I>
  Simd::Mask of(Simd::Int key, std::integer_sequence<int, I...>) const {
    Simd::Int rank = Simd::broadcast(0);
    ((rank = Simd::increment_where(comes_before<I + 1>(key), rank)), ...);
    return Simd::less(rank, num_pruned);
  }

  // Whether the key of lane ^ R is ordered before this one. In the pair's later lane equal keys count too, which adding
  // 1 to its key achieves.
  template <int R>
  Simd::Mask comes_before(Simd::Int key) const {
    return Simd::less(Simd::template exchange<R>(key), Simd::add(key, later[highest_bit(R)]));
  }
};

template <int M>
void prune_in_vectors(const Selection& s, int n, int64_t begin, int64_t end, uint8_t* pruned) {
  const LowestOfGroup<M> lowest(n);
  const bool wants_mask = s.mask != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    with_row(s.weight, row, [&](auto* w) {
      visit_scored(w, s.weight.n_cols, s.root, scale_of(s, row), s.divisor,
                   [&](auto* w, const auto scale, int64_t n_weights, int64_t first) {
                     for (int64_t col = 0; col < n_weights; col += kWidth) {
                       const Simd::Mask gone = lowest(key_of(scale.score(Simd::load(w + col), col)));
                       if (wants_mask) store_bits(pruned, first + col, Simd::to_bits(gone));
                       Simd::zero_where(gone, w + col);
                     }
                   });
    });
    emit_mask(s, row, pruned);
  }
}

// Batcher's merge exchange for any m (Knuth, volume 3, algorithm 5.2.2 M), without the comparisons that do not affect
// the wanted position: 157 of 191 remain for 16:32.
struct Network {
  uint8_t first[200], second[200];
  int size = 0;

  Network(int m, int wanted) {
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
    keep_comparisons_for(wanted);
  }

 private:
  void keep_comparisons_for(int wanted) {
    bool needed[wanda::cpu::kMaxGroup] = {};
    needed[wanted] = true;
    int kept = size;  // kept comparisons are moved to [kept, size)
    for (int i = size - 1; i >= 0; --i) {
      if (!needed[first[i]] && !needed[second[i]]) continue;
      needed[first[i]] = needed[second[i]] = true;
      --kept;
      first[kept] = first[i];
      second[kept] = second[i];
    }
    memmove(first, first + kept, size - kept);
    memmove(second, second + kept, size - kept);
    size -= kept;
  }
};

// columns[j] = key j of kWidth groups of m keys, one group per lane.
inline void load_groups(const int32_t* keys, int m, Simd::Int* columns) {
  if (m % kWidth == 0) {
    for (int j = 0; j < m; j += kWidth) {
      Simd::Float square[kWidth];
      for (int group = 0; group < kWidth; ++group) square[group] = Simd::as_float(Simd::load(keys + group * m + j));
      Simd::transpose(square);
      for (int i = 0; i < kWidth; ++i) columns[j + i] = Simd::bits(square[i]);
    }
    return;
  }
  int32_t lanes[kWidth];
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane * m;
  const Simd::Int first = Simd::load(lanes);
  for (int j = 0; j < m; ++j) columns[j] = Simd::gather(keys + j, first);
}

// One word per lane: bit j is set if key j of the lane's group is pruned.
inline Simd::Int mark_groups(const int32_t* keys, int n, int m, const Network& network) {
  Simd::Int key[wanda::cpu::kMaxGroup], sorted[wanda::cpu::kMaxGroup];
  load_groups(keys, m, key);
  for (int j = 0; j < m; ++j) sorted[j] = key[j];
  for (int i = 0; i < network.size; ++i) {
    const Simd::Int a = sorted[network.first[i]], b = sorted[network.second[i]];
    sorted[network.first[i]] = Simd::min(a, b);
    sorted[network.second[i]] = Simd::max(a, b);
  }
  // Prune every key below the threshold, then the first keys equal to it until m - n are pruned.
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

// Marks the pruned columns of a row. The network finds the key at sorted position m - n - 1.
inline void mark_by_network(const int32_t* keys, int64_t n_groups, int n, int m, const Network& network,
                            uint8_t* pruned) {
  uint64_t pending = 0;  // bits that are not written yet
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

inline void prune_nm(const Selection& s, int n, int m, int64_t begin, int64_t end, void* memory) {
  const int64_t n_cols = s.weight.n_cols;
  const Scratch scratch(memory, n_cols);
  if (m == 2) return prune_in_vectors<2>(s, n, begin, end, scratch.pruned);
  if (m == 4) return prune_in_vectors<4>(s, n, begin, end, scratch.pruned);
  if (m == 8) return prune_in_vectors<8>(s, n, begin, end, scratch.pruned);
  if constexpr (kWidth == 16) {
    if (m == 16) return prune_in_vectors<16>(s, n, begin, end, scratch.pruned);
  }
  const int64_t padded = round_up(n_cols, kWidth * m);
  const Network network(m, m - n - 1);
  for (int64_t row = begin; row < end; ++row) {
    row_keys(s, row, padded, scratch.keys);
    mark_by_network(scratch.keys, n_cols / m, n, m, network, scratch.pruned);
    apply_row(s, row, scratch.pruned);
  }
}

}  // namespace WANDA_ISA
