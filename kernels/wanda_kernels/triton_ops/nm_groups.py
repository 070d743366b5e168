"""Which n of a group's m columns are kept, with the keys in registers; ties prune the lower column first.

If one thread holds the group, it compares every pair, or sorts the halves of a group of 8 columns and more.
If the group is spread over threads, the m - n lowest (or n highest) are extracted one by one, as 64-bit
minima of (key, column).
"""

import triton
import triton.language as tl

SORT_FROM = tl.constexpr(8)  # columns of a group; for fewer, comparing every pair takes fewer operations


@triton.jit
def split_columns(x, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """x [SIZE] as a tuple of its GROUP columns, each [SIZE // GROUP]."""
    even, odd = tl.split(tl.reshape(x, (SIZE // 2, 2)))
    if GROUP == 2:
        columns = (even, odd)
    else:
        e = split_columns(even, SIZE // 2, GROUP // 2)
        o = split_columns(odd, SIZE // 2, GROUP // 2)
        if GROUP == 4:
            columns = (e[0], o[0], e[1], o[1])
        else:
            columns = (e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3])
    return columns


@triton.jit
def join_columns(c, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """The inverse of split_columns."""
    if GROUP == 2:
        even, odd = c[0], c[1]
    elif GROUP == 4:
        even = join_columns((c[0], c[2]), SIZE // 2, 2)
        odd = join_columns((c[1], c[3]), SIZE // 2, 2)
    else:
        even = join_columns((c[0], c[2], c[4], c[6]), SIZE // 2, 4)
        odd = join_columns((c[1], c[3], c[5], c[7]), SIZE // 2, 4)
    return tl.reshape(tl.join(even, odd), (SIZE,))


@triton.jit
def _kept_by_rank(c, N_PRUNED: tl.constexpr, GROUP: tl.constexpr):
    """Which columns of a group are kept; `c` is the tuple of their keys."""
    # for each pair (i, j), i < j: whether i is pruned before j; of equal keys it is
    in_order = ()
    for j in tl.static_range(GROUP):
        for i in tl.static_range(j):
            in_order += (c[i] <= c[j],)
    kept = ()
    if GROUP == 4 and N_PRUNED == 2:  # kept if two of the other three are pruned before it
        p01, p02, p12, p03, p13, p23 = (
            in_order[0], in_order[1], in_order[2], in_order[3], in_order[4], in_order[5]
        )  # fmt: skip
        kept = (
            _most_of(p01 == 0, p02 == 0, p03 == 0),
            _most_of(p01, p12 == 0, p13 == 0),
            _most_of(p02, p12, p23 == 0),
            _most_of(p03, p13, p23),
        )
    else:
        for j in tl.static_range(GROUP):
            rank = tl.zeros_like(c[0])  # number of columns pruned before column j
            for i in tl.static_range(GROUP):
                if i < j:
                    rank += in_order[j * (j - 1) // 2 + i].to(tl.int32)
                if i > j:
                    rank += 1 - in_order[i * (i - 1) // 2 + j].to(tl.int32)
            kept += (rank >= N_PRUNED,)
    return kept


@triton.jit
def _most_of(a, b, c):
    return (a & b) | (c & (a | b))


@triton.jit
def columns_from(c, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    part = ()
    for i in tl.static_range(COUNT):
        part += (c[FIRST + i * STEP],)
    return part


@triton.jit
def _merged(a, b, SIZE: tl.constexpr):
    """Merge two ascending tuples of SIZE: Batcher's odd-even merge."""
    if SIZE == 1:
        merged = (tl.minimum(a[0], b[0]), tl.maximum(a[0], b[0]))
    else:
        HALF: tl.constexpr = SIZE // 2
        even = _merged(columns_from(a, 0, 2, HALF), columns_from(b, 0, 2, HALF), HALF)
        odd = _merged(columns_from(a, 1, 2, HALF), columns_from(b, 1, 2, HALF), HALF)
        merged = (even[0],)
        for i in tl.static_range(SIZE - 1):
            merged += (tl.minimum(odd[i], even[i + 1]), tl.maximum(odd[i], even[i + 1]))
        merged += (odd[SIZE - 1],)
    return merged


@triton.jit
def _sorted(c, SIZE: tl.constexpr):
    if SIZE == 1:
        ascending = c
    else:
        HALF: tl.constexpr = SIZE // 2
        low, high = _sorted(columns_from(c, 0, 1, HALF), HALF), _sorted(columns_from(c, HALF, 1, HALF), HALF)
        ascending = _merged(low, high, HALF)
    return ascending


@triton.jit
def _nth_lowest(c, N: tl.constexpr, GROUP: tl.constexpr):
    """The N-th lowest of a tuple, N from 1: the best split into i of one half and N - i of the other."""
    HALF: tl.constexpr = GROUP // 2
    a, b = _sorted(columns_from(c, 0, 1, HALF), HALF), _sorted(columns_from(c, HALF, 1, HALF), HALF)
    nth = tl.full(c[0].shape, 0x7FFFFFFF, tl.int32)
    for i in tl.static_range(HALF + 1):
        if N - i >= 0 and N - i <= HALF:
            if i == 0:
                nth = tl.minimum(nth, b[N - 1])
            elif i == N:
                nth = tl.minimum(nth, a[N - 1])
            else:
                nth = tl.minimum(nth, tl.maximum(a[i - 1], b[N - i - 1]))
    return nth


@triton.jit
def _kept_by_sorting(c, N_PRUNED: tl.constexpr, GROUP: tl.constexpr):
    """As _kept_by_rank, in 12 operations a weight for groups of 32; comparing every pair takes 46."""
    nth = _nth_lowest(c, N_PRUNED, GROUP)
    left = tl.full(nth.shape, N_PRUNED, tl.int32)  # how many of the keys equal to nth are pruned
    equal = -left
    for j in tl.static_range(GROUP):
        left -= (c[j] < nth).to(tl.int32)
        equal += (c[j] <= nth).to(tl.int32)
    kept = ()
    for j in tl.static_range(GROUP):
        kept += (c[j] > nth,)
    # some group has more keys equal to nth than it may prune: rare unless weights repeat
    if tl.max(equal, axis=0) > 0:
        exact = ()
        for j in tl.static_range(GROUP):
            exact += ((c[j] > nth) | ((c[j] == nth) & (left <= 0)),)
            left -= (c[j] == nth).to(tl.int32)
        kept = exact
    return kept


@triton.jit
def kept_of(c, N_PRUNED: tl.constexpr, GROUP: tl.constexpr):
    if GROUP >= SORT_FROM:
        kept = _kept_by_sorting(c, N_PRUNED, GROUP)
    else:
        kept = _kept_by_rank(c, N_PRUNED, GROUP)
    return kept


@triton.jit
def kept_by_extraction(
    keys, N_PRUNED: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr
):
    column = tl.arange(0, GROUP)[None, :]
    # (key, column) in 64 bits, distinct within a group
    place = tl.reshape(keys, (SIZE // GROUP, GROUP)).to(tl.int64) << 6 | column
    if N_PRUNED <= M // 2:
        kept = place >= 0
        for _ in tl.static_range(N_PRUNED):
            lowest = tl.min(place, axis=1)[:, None]
            kept &= place != lowest
            place = tl.where(place == lowest, 1 << 62, place)
    else:
        place = tl.where(column < M, place, -1)
        kept = place < -1
        for _ in tl.static_range(M - N_PRUNED):
            highest = tl.max(place, axis=1)[:, None]
            kept |= place == highest
            place = tl.where(place == highest, -1, place)
    return tl.reshape(kept, (SIZE,))
