"""The Wanda variant: in a row, prune where a score and all lower ones sum to at most alpha * the row's sum.

W [n_rows, n_cols] in place; scale [n_cols], [n_rows, n_cols] or None; alpha is bisected until the matrix
has the ratio. No sort: for one alpha a row searches its integer keys for the highest whose mass, with all
below it, is within the limit. Mass is the fixed point of `reference.prune_variant_`, here by integer
shifts, so sums are exact in any order. Eleven launches that count and one that prunes, with no word from
the host: each leaves its pruned count, and every program replays alpha's bisection from those. Thresholds
and masses of earlier launches bracket the later ones' search. After WIDE_ROUNDS of them the keys inside
the bracket are written out, and the other launches read those alone: of LLM-like scores a fifth or less.
Launches after alpha has settled return at once. DRAM: about six reads and a write of W; passes over a row
come from L2.
Source: Wanda, arXiv 2306.11695, appendix, and its published code.
"""

from bisect import bisect_left

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.false_position import NO_SIDE, narrow, next_guess
from wanda_kernels.reference import fraction_bits
from wanda_kernels.score_keys import (
    NO_SCALE,
    PAD_KEY,
    RAW_BITS,
    highest_key,
    load_keys,
    mask_arguments,
    pack_mask,
    scale_arguments,
)

ROUNDS = tl.constexpr(11)  # alphas at most: 0.8 / 2^10 is the first interval below 0.001
WIDE_ROUNDS = tl.constexpr(3)  # of them read whole rows
NONE = tl.constexpr(-1)


@triton.jit
def _replay(counts_ptr, most_below, least_above, n_rounds):
    """Alpha after n_rounds of counts, the rounds whose alphas bracket it, and the one that settled it."""
    low, alpha = tl.full((), 0.0, tl.float64), tl.full((), 0.4, tl.float64)
    high = tl.full((), 0.8, tl.float64)
    low_round, high_round, settled_round = NONE, NONE, NONE
    for i in range(n_rounds):
        count = tl.load(counts_ptr + i)
        if settled_round == NONE:
            if count >= least_above:
                high, high_round = alpha, i
                alpha = (alpha + low) * 0.5
            elif count <= most_below:
                low, low_round = alpha, i
                alpha = (alpha + high) * 0.5
            else:
                settled_round = i
    return alpha, low_round, high_round, settled_round


@triton.jit
def _mass(keys, highest, FRACTION_BITS: tl.constexpr):
    """floor(score * 2^(FRACTION_BITS - E)) as int64, E the exponent of the row's highest score."""
    keys, highest = tl.minimum(keys, 0x7F7FFFFF), tl.minimum(highest, 0x7F7FFFFF)
    exponent = keys >> 23
    mantissa = (keys & 0x7FFFFF) | tl.where(exponent > 0, 1 << 23, 0)
    shift = FRACTION_BITS - 24 + tl.maximum(exponent, 1) - tl.maximum(highest >> 23, 1)
    lowered = mantissa >> tl.minimum(tl.maximum(-shift, 0), 31)
    return lowered.to(tl.int64) * (1 << tl.maximum(shift, 0)).to(tl.int64)  # one wide multiplication


@triton.jit
def _key_of_mass(mass, highest, FRACTION_BITS: tl.constexpr):
    """About the key of a score with that mass, for a guess."""
    exponent = tl.maximum(tl.minimum(highest, 0x7F7FFFFF) >> 23, 1)
    return mass.to(tl.float32).to(tl.int32, bitcast=True) - ((FRACTION_BITS + 126 - exponent) << 23)


@triton.jit
def _bracket(
    low_round, high_round, highest, total, thresholds_ptr, pruned_ptr, masses_ptr, row, n_rows, n_cols
):
    """low: a key that may be pruned; high: one that may not; the counts and masses up to low, below high."""
    low, n_low, mass_low = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int64)
    if low_round != NONE:
        low = tl.load(thresholds_ptr + low_round * n_rows + row)
        n_low = tl.load(pruned_ptr + low_round * n_rows + row)
        mass_low = tl.load(masses_ptr + low_round * n_rows + row)
    high, n_high, mass_high = highest + 1, n_cols, total
    if high_round != NONE:
        high = tl.load(thresholds_ptr + high_round * n_rows + row) + 1
        n_high = tl.load(pruned_ptr + high_round * n_rows + row)
        mass_high = tl.load(masses_ptr + high_round * n_rows + row)
    return low, n_low, mass_low, high, n_high, mass_high


@triton.jit
def _inside_keys(w_ptr, scale_ptr, keys_ptr, offs, n, are_written, SCALE: tl.constexpr):
    """A row's keys, or those of them that were inside the bracket and written out."""
    if are_written:
        keys = tl.load(keys_ptr + offs, mask=offs < n, other=PAD_KEY)
    else:
        keys = load_keys(w_ptr + offs, scale_ptr + offs, offs < n, SCALE)
    return keys


@triton.jit(do_not_specialize=["most_below", "least_above", "this_round"])
def _count_round_kernel(
    w_ptr, stride_wm,
    scale_ptr, stride_sm,
    keys_ptr, stride_km,  # int32 [n_rows, stride_km]: keys inside the bracket after WIDE_ROUNDS
    counts_ptr, most_below, least_above,  # int64 [ROUNDS]; a count between the two settles alpha
    thresholds_ptr, pruned_ptr,  # int32 [ROUNDS, n_rows]: highest key pruned, and how many of the row are
    masses_ptr,  # int64 [ROUNDS, n_rows]: their mass
    highest_ptr, total_ptr,  # int32, int64 [n_rows]: the row's highest key and mass
    n_rows, n_cols, this_round,
    FRACTION_BITS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    alpha, low_round, high_round, settled_round = _replay(counts_ptr, most_below, least_above, this_round)
    if settled_round == NONE:
        row = tl.program_id(0).to(tl.int64)
        w_ptr += row * stride_wm
        scale_ptr += row * stride_sm
        keys_ptr += row * stride_km
        if this_round == 0:
            highest = tl.full((), -1, tl.int32)
            for first_col in range(0, n_cols, BLOCK):
                offs = first_col + tl.arange(0, BLOCK)
                keys = load_keys(w_ptr + offs, scale_ptr + offs, offs < n_cols, SCALE)  # [BLOCK]
                highest = tl.maximum(highest, highest_key(keys))
            masses = tl.zeros((BLOCK,), tl.int64)
            for first_col in range(0, n_cols, BLOCK):
                offs = first_col + tl.arange(0, BLOCK)
                keys = load_keys(w_ptr + offs, scale_ptr + offs, offs < n_cols, SCALE)
                masses += tl.where(offs < n_cols, _mass(keys, highest, FRACTION_BITS), 0)
            total = tl.sum(masses)
            tl.store(highest_ptr + row, highest)
            tl.store(total_ptr + row, total)
        else:
            highest = tl.load(highest_ptr + row)
            total = tl.load(total_ptr + row)
        limit = (total.to(tl.float64) * alpha).to(tl.int64)

        low, n_low, mass_low, high, n_high, mass_high = _bracket(
            low_round, high_round, highest, total, thresholds_ptr, pruned_ptr, masses_ptr, row, n_rows, n_cols
        )
        # what is read, and what lies below all of it
        n, n_base, mass_base = n_cols, tl.full((), 0, tl.int32), tl.full((), 0, tl.int64)
        are_written = False
        if this_round >= WIDE_ROUNDS:
            _, early_low, early_high, _ = _replay(counts_ptr, most_below, least_above, WIDE_ROUNDS)
            _, n_under, mass_under, _, n_upto, _ = _bracket(
                early_low,
                early_high,
                highest,
                total,
                thresholds_ptr,
                pruned_ptr,
                masses_ptr,
                row,
                n_rows,
                n_cols,
            )
            are_written = n_upto - n_under <= stride_km
            n = tl.where(are_written, n_upto - n_under, n_cols)
            n_base = tl.where(are_written, n_under, 0)
            mass_base = tl.where(are_written, mass_under, 0)

        missing = tl.maximum(limit - mass_low, 1).to(tl.float32)
        surplus = tl.maximum(mass_high - limit, 1).to(tl.float32)
        side, n_passes = NO_SIDE, 0
        while (high - low > 1) & (n_low != n_high):
            guess = next_guess(low, high, missing, surplus, n_passes)
            if (n_passes == 0) & (low == -1):  # n_cols such scores are just within the limit
                guess = _key_of_mass(limit // n_cols, highest, FRACTION_BITS)
                guess = tl.minimum(tl.maximum(guess, low + 1), high - 1)
            masses = tl.zeros((BLOCK,), tl.int64)
            counts = tl.zeros((BLOCK,), tl.int32)  # of keys below and, 2^16 a key, equal to guess
            for first_col in range(0, n, BLOCK):
                offs = first_col + tl.arange(0, BLOCK)
                keys = _inside_keys(w_ptr, scale_ptr, keys_ptr, offs, n, are_written, SCALE)
                masses += tl.where(keys < guess, _mass(keys, highest, FRACTION_BITS), 0)
                counts += tl.where(keys < guess, 1, tl.where(keys == guess, 1 << 16, 0))
            n_below, n_equal = n_base + tl.sum(counts & 0xFFFF), tl.sum(counts >> 16)
            mass_below, of_guess = mass_base + tl.sum(masses), _mass(guess, highest, FRACTION_BITS)
            reach = mass_below + of_guess
            n_low = tl.where(reach <= limit, n_below + n_equal, n_low)
            mass_low = tl.where(reach <= limit, mass_below + n_equal * of_guess, mass_low)
            n_high = tl.where(reach <= limit, n_high, n_below)
            low, high, _, missing, surplus, side = narrow(
                low, high, reach, missing, surplus, side, guess, reach, limit
            )
            n_passes += 1
        tl.store(thresholds_ptr + this_round * n_rows + row, low)
        tl.store(pruned_ptr + this_round * n_rows + row, n_low)
        tl.store(masses_ptr + this_round * n_rows + row, mass_low)
        tl.atomic_add(counts_ptr + this_round, n_low.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["most_below", "least_above"])
def _write_inside_kernel(
    w_ptr, stride_wm,
    scale_ptr, stride_sm,
    keys_ptr, stride_km,
    counts_ptr, most_below, least_above,
    thresholds_ptr, pruned_ptr, masses_ptr,
    n_rows, n_cols,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's keys inside the bracket after WIDE_ROUNDS, in order of columns, where they fit."""
    _, low_round, high_round, settled_round = _replay(counts_ptr, most_below, least_above, WIDE_ROUNDS)
    row = tl.program_id(0).to(tl.int64)
    nothing = tl.full((), 0, tl.int64)
    low, n_low, _, high, n_high, _ = _bracket(
        low_round,
        high_round,
        PAD_KEY - 1,
        nothing,
        thresholds_ptr,
        pruned_ptr,
        masses_ptr,
        row,
        n_rows,
        n_cols,
    )
    if (settled_round == NONE) & (n_high - n_low <= stride_km):
        w_ptr += row * stride_wm
        scale_ptr += row * stride_sm
        keys_ptr += row * stride_km
        n_written = 0
        for first_col in range(0, n_cols, BLOCK):
            offs = first_col + tl.arange(0, BLOCK)
            keys = load_keys(w_ptr + offs, scale_ptr + offs, offs < n_cols, SCALE)
            inside = ((keys > low) & (keys < high)).to(tl.int32)
            tl.store(keys_ptr + n_written + tl.cumsum(inside) - 1, keys, mask=inside == 1)
            n_written += tl.sum(inside)


@triton.jit(do_not_specialize=["most_below", "least_above"])
def _prune_variant_kernel(
    w_ptr, stride_wm,
    scale_ptr, stride_sm,
    mask_ptr, stride_mm,
    counts_ptr, most_below, least_above,
    thresholds_ptr,
    alpha_ptr,  # fp64 [], written
    n_rows, n_cols,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    alpha, _, _, settled_round = _replay(counts_ptr, most_below, least_above, ROUNDS - 1)
    if (row == 0) & (tl.program_id(1) == 0):
        tl.store(alpha_ptr, alpha)
    last_round = tl.where(settled_round == NONE, ROUNDS - 1, settled_round)
    threshold = tl.load(thresholds_ptr + last_round * n_rows + row)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n_cols
    w_ptrs = w_ptr + row * stride_wm + offs
    kept = load_keys(w_ptrs, scale_ptr + row * stride_sm + offs, inside, SCALE) > threshold  # [BLOCK]
    tl.store(w_ptrs, tl.where(kept, tl.load(w_ptrs, mask=inside), 0.0), mask=inside)
    if HAS_MASK:
        offs = tl.program_id(1) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        mask_ptrs = mask_ptr + row * stride_mm + offs
        tl.store(mask_ptrs, pack_mask(kept & inside, BLOCK), mask=offs < tl.cdiv(n_cols, 8))


def _settling_counts(numel: int, ratio: float) -> tuple[int, int]:
    """The highest pruned count that is too low for `ratio`, and the lowest that is too high."""
    first_in = bisect_left(range(numel + 1), True, key=lambda count: count / numel - ratio >= -0.001)
    first_above = bisect_left(range(numel + 1), True, key=lambda count: count / numel - ratio > 0.001)
    return first_in - 1, first_above


def _most_written(n_cols: int) -> int:
    """Keys of a row that may be written out: half the bytes of 16-bit weights."""
    return triton.cdiv(n_cols, 4)


def prune_variant_(weight: Tensor, scale: Tensor | None, ratio: float, mask: Tensor | None) -> Tensor:
    n_rows, n_cols = weight.shape
    scale, stride_sm, kind = scale_arguments(weight, scale)
    kind = NO_SCALE.value if kind == RAW_BITS.value else kind  # masses want the bits of an fp32 score
    packed, stride_mm = mask_arguments(weight, mask)
    operands = (weight, weight.stride(0), scale, stride_sm)
    counts = torch.zeros(ROUNDS.value, dtype=torch.int64, device=weight.device)
    thresholds, pruned = weight.new_empty(2, ROUNDS.value, n_rows, dtype=torch.int32)
    masses = weight.new_empty(ROUNDS.value, n_rows, dtype=torch.int64)
    highest, total = weight.new_empty(n_rows, dtype=torch.int32), weight.new_empty(n_rows, dtype=torch.int64)
    keys = weight.new_empty(n_rows, _most_written(n_cols), dtype=torch.int32)
    alpha = weight.new_empty((), dtype=torch.float64)
    block = min(2048, triton.next_power_of_2(max(n_cols, 256)))  # four keys a thread: eight spill
    search = (counts, *_settling_counts(weight.numel(), ratio))
    for this_round in range(ROUNDS.value):
        if this_round == WIDE_ROUNDS.value:
            _write_inside_kernel[(n_rows,)](
                *operands, keys, keys.shape[1], *search, thresholds, pruned, masses, n_rows, n_cols,
                SCALE=kind, BLOCK=min(block, 1024), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        each = block if this_round < WIDE_ROUNDS.value else min(block, 1024)
        _count_round_kernel[(n_rows,)](
            *operands, keys, keys.shape[1], *search, thresholds, pruned, masses, highest, total,
            n_rows, n_cols, this_round, FRACTION_BITS=fraction_bits(n_cols), SCALE=kind, BLOCK=each,
            num_warps=each // 128, enable_fp_fusion=False,
        )  # fmt: skip
    _prune_variant_kernel[(n_rows, triton.cdiv(n_cols, 1024))](
        *operands, packed, stride_mm, *search, thresholds, alpha, n_rows, n_cols,
        SCALE=kind, HAS_MASK=mask is not None, BLOCK=1024, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return alpha
