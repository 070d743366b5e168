"""Zero the num_pruned lowest scores of each row; ties prune the lower column first.

W [E, n_rows, n_cols] in place; scale [E, n_cols], [E, n_rows, n_cols] or None. One launch for all matrices.
Reads W once from DRAM and writes it once: 4 bytes a 16-bit weight, and 4 more with a scale matrix; the roof
is copy bandwidth. A row's keys stay in registers. A search finds the threshold: it narrows low < high until
num_pruned keys are below low, or one key value is left; then the same search over columns divides the ties.
The cost is in counting the keys below a guess: about 9 passes a row on LLM-like scores (halving takes 14 to
17). A row too long for the registers is read again, from L2, at every pass. prune_strided_rows.py has the
kernel for transposed storage.
Source: RTop-K (ICLR 2025), which bisects float values for a small k; integer keys make it exact, with stable
ties.
"""

import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.triton_ops.prune_strided_rows import MOST_COLUMNS, prune_strided_rows_
from wanda_kernels.triton_ops.row_search import NO_SIDE, narrow, next_guess
from wanda_kernels.triton_ops.score_keys import (
    PAD_KEY,
    highest_key,
    load_keys,
    mask_arguments,
    n_matrices,
    pack_mask,
    row_of_stack,
    scale_arguments,
    stack_strides,
)


@triton.jit
def _count_ties(keys, key, first_col, col_end, BLOCK: tl.constexpr):
    """How many of a segment's keys equal `key` in columns before col_end."""
    return tl.sum(((keys == key) & (first_col + tl.arange(0, BLOCK) < col_end)).to(tl.int32))


@triton.jit
def _to_columns(offs, stride_wn, STRIDED: tl.constexpr):
    """Offsets in memory of a row's columns."""
    return offs.to(tl.int64) * stride_wn if STRIDED else offs


@triton.jit
def _keys_from(w_ptr, stride_wn, scale_ptr, offs, n_cols, STRIDED: tl.constexpr, SCALE: tl.constexpr):
    return load_keys(w_ptr + _to_columns(offs, stride_wn, STRIDED), scale_ptr + offs, offs < n_cols, SCALE)


@triton.jit
def _store_kept(
    w_ptr, stride_wn, mask_ptr, keys, key, tie_end, first_col, n_cols,
    STRIDED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a segment back, +0.0 where its key is below `key`, or equal to it in a column before tie_end."""
    offs = first_col + tl.arange(0, BLOCK)
    inside = offs < n_cols
    kept = (keys > key) | ((keys == key) & (offs >= tie_end))
    # from L2: holding it through the passes would take registers
    w_ptrs = w_ptr + _to_columns(offs, stride_wn, STRIDED)
    w = tl.load(w_ptrs, mask=inside)
    tl.store(w_ptrs, tl.where(kept, w, 0.0), mask=inside)
    if HAS_MASK:
        offs = first_col // 8 + tl.arange(0, BLOCK // 8)
        tl.store(mask_ptr + offs, pack_mask(kept & inside, BLOCK), mask=offs < tl.cdiv(n_cols, 8))


@triton.jit
def threshold_in_registers(
    k0, k1, k2, lowest, highest, n_cols, num_pruned,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    """(key, tie_end): keys below `key`, and those equal to it in a column before tie_end, are pruned.

    k0 [B0], k1 [B1], k2 [B2]: the row's segments, of which one of 0 columns is not read; lowest, highest: of
    all its keys.
    """
    # narrow low < high, with `below` keys under low, until below is num_pruned or one key value is left
    high = highest + 1
    low = tl.where(num_pruned == n_cols, high, lowest)
    below = tl.where(num_pruned == n_cols, n_cols, 0)
    missing, surplus = num_pruned.to(tl.float32), (n_cols - num_pruned).to(tl.float32)
    side, n_passes = NO_SIDE, 0
    while (high - low > 1) & (below != num_pruned):
        guess = next_guess(low, high, missing, surplus, n_passes)
        count = tl.sum((k0 < guess).to(tl.int32))
        if B1 > 0:
            count += tl.sum((k1 < guess).to(tl.int32))
        if B2 > 0:
            count += tl.sum((k2 < guess).to(tl.int32))
        low, high, below, missing, surplus, side = narrow(
            low, high, below, missing, surplus, side, guess, count, num_pruned
        )
        n_passes += 1

    # of the keys equal to low, the first columns are pruned: the same search, over columns
    ties = num_pruned - below
    tie_low, tie_high, tie_below = 0, n_cols, 0
    missing, surplus, side, n_passes = ties.to(tl.float32), ties.to(tl.float32), NO_SIDE, 0
    while (tie_high - tie_low > 1) & (tie_below != ties):
        guess = next_guess(tie_low, tie_high, missing, surplus, n_passes)
        count = _count_ties(k0, low, 0, guess, B0)
        if B1 > 0:
            count += _count_ties(k1, low, B0, guess, B1)
        if B2 > 0:
            count += _count_ties(k2, low, B0 + B1, guess, B2)
        tie_low, tie_high, tie_below, missing, surplus, side = narrow(
            tie_low, tie_high, tie_below, missing, surplus, side, guess, count, ties
        )
        n_passes += 1
    return low, tie_low


@triton.jit
def threshold_in_memory(
    w_ptr, stride_wn, scale_ptr, n_cols, num_pruned,
    STRIDED: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As threshold_in_registers, for a row of any length, which is read again at every pass."""
    lowest, highest = PAD_KEY, -1
    for first_col in range(0, n_cols, BLOCK):
        offs = first_col + tl.arange(0, BLOCK)
        keys = _keys_from(w_ptr, stride_wn, scale_ptr, offs, n_cols, STRIDED, SCALE)  # [BLOCK]
        lowest, highest = tl.minimum(lowest, tl.min(keys)), tl.maximum(highest, highest_key(keys))

    high = highest + 1
    low = tl.where(num_pruned == n_cols, high, lowest)
    below = tl.where(num_pruned == n_cols, n_cols, 0)
    missing, surplus = num_pruned.to(tl.float32), (n_cols - num_pruned).to(tl.float32)
    side, n_passes = NO_SIDE, 0
    while (high - low > 1) & (below != num_pruned):
        guess = next_guess(low, high, missing, surplus, n_passes)
        counts = tl.zeros((BLOCK,), tl.int32)
        for first_col in range(0, n_cols, BLOCK):
            offs = first_col + tl.arange(0, BLOCK)
            counts += _keys_from(w_ptr, stride_wn, scale_ptr, offs, n_cols, STRIDED, SCALE) < guess
        low, high, below, missing, surplus, side = narrow(
            low, high, below, missing, surplus, side, guess, tl.sum(counts), num_pruned
        )
        n_passes += 1

    ties = num_pruned - below
    tie_low, tie_high, tie_below = 0, n_cols, 0
    missing, surplus, side, n_passes = ties.to(tl.float32), ties.to(tl.float32), NO_SIDE, 0
    while (tie_high - tie_low > 1) & (tie_below != ties):
        guess = next_guess(tie_low, tie_high, missing, surplus, n_passes)
        count = 0
        for first_col in range(0, guess, BLOCK):
            offs = first_col + tl.arange(0, BLOCK)
            keys = _keys_from(w_ptr, stride_wn, scale_ptr, offs, n_cols, STRIDED, SCALE)
            count += _count_ties(keys, low, first_col, guess, BLOCK)
        tie_low, tie_high, tie_below, missing, surplus, side = narrow(
            tie_low, tie_high, tie_below, missing, surplus, side, guess, count, ties
        )
        n_passes += 1
    return low, tie_low


@triton.jit(do_not_specialize=["num_pruned"])
def _prune_rows_kernel(
    w_ptr, stride_we, stride_wm,
    scale_ptr, stride_se, stride_sm,
    mask_ptr, stride_mm,
    n_rows, n_cols, num_pruned,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    w_ptr = row_of_stack(w_ptr, row, n_rows, stride_we, stride_wm)
    scale_ptr = row_of_stack(scale_ptr, row, n_rows, stride_se, stride_sm)
    mask_ptr += row.to(tl.int64) * stride_mm

    offs_0 = tl.arange(0, B0)
    k0 = load_keys(w_ptr + offs_0, scale_ptr + offs_0, offs_0 < n_cols, SCALE)  # [B0]
    k1, k2 = k0, k0
    lowest, highest = tl.min(k0), highest_key(k0)
    if B1 > 0:
        offs_1 = B0 + tl.arange(0, B1)
        k1 = load_keys(w_ptr + offs_1, scale_ptr + offs_1, offs_1 < n_cols, SCALE)  # [B1]
        lowest, highest = tl.minimum(lowest, tl.min(k1)), tl.maximum(highest, highest_key(k1))
    if B2 > 0:
        offs_2 = B0 + B1 + tl.arange(0, B2)
        k2 = load_keys(w_ptr + offs_2, scale_ptr + offs_2, offs_2 < n_cols, SCALE)  # [B2]
        lowest, highest = tl.minimum(lowest, tl.min(k2)), tl.maximum(highest, highest_key(k2))
    key, tie_end = threshold_in_registers(k0, k1, k2, lowest, highest, n_cols, num_pruned, B0, B1, B2)

    _store_kept(w_ptr, 1, mask_ptr, k0, key, tie_end, 0, n_cols, False, HAS_MASK, B0)
    if B1 > 0:
        _store_kept(w_ptr, 1, mask_ptr, k1, key, tie_end, B0, n_cols, False, HAS_MASK, B1)
    if B2 > 0:
        _store_kept(w_ptr, 1, mask_ptr, k2, key, tie_end, B0 + B1, n_cols, False, HAS_MASK, B2)


@triton.jit(do_not_specialize=["num_pruned"])
def _prune_long_rows_kernel(
    w_ptr, stride_we, stride_wm, stride_wn,
    scale_ptr, stride_se, stride_sm,
    mask_ptr, stride_mm,
    n_rows, n_cols, num_pruned,
    STRIDED: tl.constexpr, SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    w_ptr = row_of_stack(w_ptr, row, n_rows, stride_we, stride_wm)
    scale_ptr = row_of_stack(scale_ptr, row, n_rows, stride_se, stride_sm)
    mask_ptr += row.to(tl.int64) * stride_mm
    key, tie_end = threshold_in_memory(w_ptr, stride_wn, scale_ptr, n_cols, num_pruned, STRIDED, SCALE, BLOCK)
    for first_col in range(0, n_cols, BLOCK):
        offs = first_col + tl.arange(0, BLOCK)
        keys = _keys_from(w_ptr, stride_wn, scale_ptr, offs, n_cols, STRIDED, SCALE)
        _store_kept(
            w_ptr, stride_wn, mask_ptr, keys, key, tie_end, first_col, n_cols, STRIDED, HAS_MASK, BLOCK
        )


# most columns -> segments in registers, warps. Segments compare 30 % fewer keys than one padded block.
SEGMENTS = (
    (128, (128, 0, 0), 1),  # one warp a row: no barriers
    (256, (256, 0, 0), 1),
    (512, (512, 0, 0), 1),
    (1024, (1024, 0, 0), 2),  # 16 keys a thread from here to 4096
    (2048, (2048, 0, 0), 4),
    (3072, (2048, 1024, 0), 4),
    (4096, (4096, 0, 0), 8),
    (5120, (4096, 1024, 0), 8),
    (6144, (4096, 2048, 0), 8),
    (8192, (8192, 0, 0), 8),
    (11264, (8192, 2048, 1024), 16),  # 11008, Llama-2-7B
    (14336, (8192, 4096, 2048), 16),  # Llama-3-8B; 13824, Llama-2-13B
    (16384, (16384, 0, 0), 16),
    (20480, (16384, 4096, 0), 16),  # 18944, Qwen2-7B; 17920, Phi-4
    (28672, (16384, 8192, 4096), 32),  # Llama-3-70B; 28 keys a thread of 64 registers: no more fit
)
IN_PARTS, IN_PARTS_WARPS = 8192, 16  # longer rows: columns at a time


def _segments(n_cols: int, spills: bool) -> tuple[tuple[int, int, int], int] | None:
    """Segments and warps for a row that fits the registers; None if it does not."""
    for most_cols, segments, num_warps in SEGMENTS:
        if n_cols <= most_cols and not (num_warps == 32 and spills):
            return segments, num_warps
    return None


def prune_rows_(weight: Tensor, scale: Tensor | None, num_pruned: int, mask: Tensor | None) -> None:
    n_rows, n_cols = weight.shape[-2:]
    is_strided = n_cols > 1 and weight.stride(-1) != 1
    if is_strided and n_cols <= MOST_COLUMNS:
        prune_strided_rows_(weight, scale, num_pruned, mask)
        return
    scale, stride_se, stride_sm, kind = scale_arguments(weight, scale)
    packed, stride_mm = mask_arguments(weight, mask)
    strides = stack_strides(weight)
    others = (scale, stride_se, stride_sm, packed, stride_mm, n_rows, n_cols, num_pruned)
    flags = {"SCALE": kind, "HAS_MASK": mask is not None, "enable_fp_fusion": False}
    grid = (n_matrices(weight) * n_rows,)
    # packing the bits of 28 fp32 keys a thread takes 48 bytes of stack
    tile = _segments(n_cols, spills=mask is not None and weight.element_size() == 4)
    if tile is None or is_strided:
        # strided columns have an address each, so that half as many fit
        block = IN_PARTS // 2 if is_strided else IN_PARTS
        flags |= {"STRIDED": is_strided, "BLOCK": block, "num_warps": IN_PARTS_WARPS}
        _prune_long_rows_kernel[grid](weight, *strides, weight.stride(-1), *others, **flags)
        return
    (b0, b1, b2), num_warps = tile
    _prune_rows_kernel[grid](weight, *strides, *others, **flags, B0=b0, B1=b1, B2=b2, num_warps=num_warps)
