"""The Wanda variant: in a row, prune where a score and all lower ones sum to at most alpha * the row's sum.

W [n_rows, n_cols] in place; scale [n_cols], [n_rows, n_cols] or None; alpha is bisected until the matrix
has the ratio. No sort: for one alpha a row searches its integer keys for the highest whose mass, with all
below it, is within the limit. Mass is the fixed point of `reference.prune_variant_`, here by integer
shifts, so sums are exact in any order. Eleven launches that count and one that prunes, with no word from
the host: each leaves its pruned count, and every program replays alpha's bisection from those. Thresholds
of earlier launches bracket the later ones' search, and launches after alpha has settled return at once.
DRAM: up to 11 reads, one more and a write; passes over a row come from L2.
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
    RAW_BITS,
    highest_key,
    load_keys,
    mask_arguments,
    pack_mask,
    scale_arguments,
)

ROUNDS = tl.constexpr(11)  # alphas at most: 0.8 / 2^10 is the first interval below 0.001
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
    raised = mantissa.to(tl.int64) << tl.maximum(shift, 0).to(tl.int64)
    return raised >> tl.minimum(tl.maximum(-shift, 0), 63).to(tl.int64)


@triton.jit(do_not_specialize=["most_below", "least_above", "this_round"])
def _count_round_kernel(
    w_ptr, stride_wm,
    scale_ptr, stride_sm,
    counts_ptr, most_below, least_above,  # int64 [ROUNDS]; a count between the two settles alpha
    thresholds_ptr, pruned_ptr,  # int32 [ROUNDS, n_rows]: highest key pruned, and how many of the row are
    n_rows, n_cols, this_round,
    FRACTION_BITS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    alpha, low_round, high_round, settled_round = _replay(counts_ptr, most_below, least_above, this_round)
    if settled_round == NONE:
        row = tl.program_id(0).to(tl.int64)
        w_ptr += row * stride_wm
        scale_ptr += row * stride_sm
        highest = -1
        for first_col in range(0, n_cols, BLOCK):
            offs = first_col + tl.arange(0, BLOCK)
            keys = load_keys(w_ptr + offs, scale_ptr + offs, offs < n_cols, SCALE)  # [BLOCK]
            highest = tl.maximum(highest, highest_key(keys))
        masses = tl.zeros((BLOCK,), tl.int64)
        for first_col in range(0, n_cols, BLOCK):
            offs = first_col + tl.arange(0, BLOCK)
            keys = load_keys(w_ptr + offs, scale_ptr + offs, offs < n_cols, SCALE)
            masses += tl.where(offs < n_cols, _mass(keys, highest, FRACTION_BITS), 0)
        limit = (tl.sum(masses).to(tl.float64) * alpha).to(tl.int64)

        # low: a key that may be pruned; high: one that may not; n_low, n_high: keys up to low, below high
        low, n_low = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
        if low_round != NONE:
            low = tl.load(thresholds_ptr + low_round * n_rows + row)
            n_low = tl.load(pruned_ptr + low_round * n_rows + row)
        high, n_high = highest + 1, n_cols
        if high_round != NONE:
            high = tl.load(thresholds_ptr + high_round * n_rows + row) + 1
            n_high = tl.load(pruned_ptr + high_round * n_rows + row)
        missing, surplus, side, n_passes = 1.0, 1.0, NO_SIDE, 0
        while (high - low > 1) & (n_low != n_high):
            guess = next_guess(low, high, missing, surplus, n_passes)
            masses = tl.zeros((BLOCK,), tl.int64)
            counts = tl.zeros((BLOCK,), tl.int32)  # of keys below and, 2^16 a key, equal to guess
            for first_col in range(0, n_cols, BLOCK):
                offs = first_col + tl.arange(0, BLOCK)
                keys = load_keys(w_ptr + offs, scale_ptr + offs, offs < n_cols, SCALE)
                masses += tl.where(keys < guess, _mass(keys, highest, FRACTION_BITS), 0)
                counts += tl.where(keys < guess, 1, tl.where(keys == guess, 1 << 16, 0))
            n_below, n_equal = tl.sum(counts & 0xFFFF), tl.sum(counts >> 16)
            reach = tl.sum(masses) + _mass(guess, highest, FRACTION_BITS)
            n_low = tl.where(reach <= limit, n_below + n_equal, n_low)
            n_high = tl.where(reach <= limit, n_high, n_below)
            low, high, _, missing, surplus, side = narrow(
                low, high, reach, missing, surplus, side, guess, reach, limit
            )
            n_passes += 1
        tl.store(thresholds_ptr + this_round * n_rows + row, low)
        tl.store(pruned_ptr + this_round * n_rows + row, n_low)
        tl.atomic_add(counts_ptr + this_round, n_low.to(tl.int64), sem="relaxed")


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


def prune_variant_(weight: Tensor, scale: Tensor | None, ratio: float, mask: Tensor | None) -> Tensor:
    n_rows, n_cols = weight.shape
    scale, stride_sm, kind = scale_arguments(weight, scale)
    kind = NO_SCALE.value if kind == RAW_BITS.value else kind  # masses want the bits of an fp32 score
    packed, stride_mm = mask_arguments(weight, mask)
    operands = (weight, weight.stride(0), scale, stride_sm)
    counts = torch.zeros(ROUNDS.value, dtype=torch.int64, device=weight.device)
    thresholds, pruned = torch.empty(2, ROUNDS.value, n_rows, dtype=torch.int32, device=weight.device)
    alpha = torch.empty((), dtype=torch.float64, device=weight.device)
    block = min(2048, triton.next_power_of_2(max(n_cols, 256)))  # four keys a thread: eight spill
    search = (counts, *_settling_counts(weight.numel(), ratio))
    for this_round in range(ROUNDS.value):
        _count_round_kernel[(n_rows,)](
            *operands, *search, thresholds, pruned, n_rows, n_cols, this_round,
            FRACTION_BITS=fraction_bits(n_cols), SCALE=kind, BLOCK=block,
            num_warps=block // 128, enable_fp_fusion=False,
        )  # fmt: skip
    _prune_variant_kernel[(n_rows, triton.cdiv(n_cols, 1024))](
        *operands, packed, stride_mm, *search, thresholds, alpha, n_rows, n_cols,
        SCALE=kind, HAS_MASK=mask is not None, BLOCK=1024, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return alpha
