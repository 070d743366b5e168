"""Keep the n highest scores of every m consecutive columns; ties prune the lower column first.

W [E, n_rows, n_cols] in place, n_cols a multiple of m; scale [E, n_cols], [E, n_rows, n_cols] or None. One
launch for all matrices. Reads W once and writes it once: 4 bytes a 16-bit weight, and 4 more with a scale
matrix; the roof is copy bandwidth. A program takes several rows of its columns, so that it reads a scale
vector once for all of them. prune_strided_nm.py has the kernel for transposed storage.
If m is a power of two, one thread holds a whole group: a short group in one 16-byte load, a long one in
several. For any other m, a group is spread over threads. `nm_groups.py` chooses which of a group are kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_kernels.mask_bits import pack_bits
from wanda_kernels.triton_ops.nm_groups import (
    columns_from,
    join_columns,
    kept_by_extraction,
    kept_of,
    split_columns,
)
from wanda_kernels.triton_ops.prune_strided_nm import prune_strided_nm_
from wanda_kernels.triton_ops.score_keys import (
    MASK_BITS,
    MASK_BYTES,
    NO_MASK,
    ROOT_VECTOR,
    SCALE_MATRIX,
    keys_of,
    mask_arguments,
    n_matrices,
    pack_mask,
    scale_arguments,
    stack_strides,
    tile_of_stack,
)


@triton.jit
def _root_of(scale_ptrs, inside, SCALE: tl.constexpr):
    """Roots of a scale vector, each loaded and computed once for all rows of a program."""
    root = tl.load(scale_ptrs, mask=inside, other=0.0) if SCALE == ROOT_VECTOR else 0.0
    return tl.sqrt_rn(root) if SCALE == ROOT_VECTOR else root


@triton.jit
def _prune_short_groups_kernel(
    w_ptr, stride_we, stride_wm,
    scale_ptr, stride_se, stride_sm,
    mask_ptr, stride_mm,
    n_rows, n_cols,
    N_PRUNED: tl.constexpr, GROUP: tl.constexpr,  # within one thread's 16-byte load
    SCALE: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    matrix, first_row = tile_of_stack(tl.program_id(0), n_rows, BLOCK_M * TILES)
    w_ptr, scale_ptr = w_ptr + matrix * stride_we, scale_ptr + matrix * stride_se
    first_row += tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    # no group is half outside, so keys outside of the matrix need no padding value
    everywhere = tl.full((BLOCK_M, BLOCK_N), 1, tl.int1)
    # all loads are issued before the first is used
    weights = ()
    for tile in tl.static_range(TILES):
        rows = first_row + tile * BLOCK_M
        inside = (rows < n_rows) & (cols < n_cols)
        weights += (tl.load(w_ptr + rows * stride_wm + cols, mask=inside, other=0.0),)  # [BLOCK_M, BLOCK_N]
    # in the weights' shape: in its own shape it would change layout through shared memory
    root = _root_of(scale_ptr + first_row * 0 + cols, (first_row >= 0) & (cols < n_cols), SCALE)
    for tile in tl.static_range(TILES):
        rows, w = first_row + tile * BLOCK_M, weights[tile]
        inside = (rows < n_rows) & (cols < n_cols)
        scale = root
        if SCALE == SCALE_MATRIX:
            scale = tl.load(scale_ptr + rows * stride_sm + cols, mask=inside, other=0.0)
        keys = tl.reshape(keys_of(w, scale, everywhere, SCALE), (SIZE,))
        kept = kept_of(split_columns(keys, SIZE, GROUP), N_PRUNED, GROUP)
        kept = tl.reshape(join_columns(kept, SIZE, GROUP), (BLOCK_M, BLOCK_N))
        tl.store(w_ptr + rows * stride_wm + cols, tl.where(kept, w, 0.0), mask=inside)
        if MASK == MASK_BITS:
            packed = pack_mask(tl.reshape(kept & inside, (SIZE,)), SIZE)
            offs = tl.program_id(1) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)[None, :]
            mask_ptrs = mask_ptr + (matrix * n_rows + rows) * stride_mm + offs
            packed = tl.reshape(packed, (BLOCK_M, BLOCK_N // 8))
            tl.store(mask_ptrs, packed, mask=(rows < n_rows) & (offs < tl.cdiv(n_cols, 8)))


@triton.jit
def _long_group(ptrs, inside, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """One group for each thread, as the 16-byte pieces that are loaded."""
    pieces = ()
    for i in tl.static_range(CHUNKS):
        pieces += (tl.load(ptrs + i * CHUNK, mask=inside, other=0.0),)
    return pieces


@triton.jit
def _prune_long_groups_kernel(
    w_ptr, stride_we, stride_wm,
    scale_ptr, stride_se, stride_sm,
    mask_ptr, stride_mm,
    n_rows, n_cols,
    N_PRUNED: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,  # CHUNK: weights in 16 bytes
    SCALE: tl.constexpr, MASK: tl.constexpr,
    GROUPS_M: tl.constexpr, GROUPS_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = GROUP // CHUNK
    GROUPS: tl.constexpr = GROUPS_M * GROUPS_N  # of a tile, one or two a thread
    group = tl.arange(0, GROUPS)[:, None]
    matrix, first_row = tile_of_stack(tl.program_id(0), n_rows, GROUPS_M * TILES)
    w_ptr, scale_ptr = w_ptr + matrix * stride_we, scale_ptr + matrix * stride_se
    first_row += group // GROUPS_N  # [GROUPS, 1]
    first_col = (tl.program_id(1) * GROUPS_N + group % GROUPS_N) * GROUP
    offs = first_col + tl.arange(0, CHUNK)[None, :]  # [GROUPS, CHUNK]
    everywhere = tl.full((GROUPS, CHUNK), 1, tl.int1)
    ptrs = w_ptr + first_row * stride_wm + offs
    weights = _long_group(ptrs, (first_row < n_rows) & (first_col < n_cols), CHUNKS, CHUNK)
    roots = ()
    for i in tl.static_range(CHUNKS):
        roots += (_root_of(scale_ptr + offs + i * CHUNK, (offs >= 0) & (first_col < n_cols), SCALE),)
    for tile in range(TILES):
        rows = first_row + tile * GROUPS_M
        inside = (rows < n_rows) & (first_col < n_cols)
        ptrs = w_ptr + rows * stride_wm + offs
        # load the next group while this one is sorted
        later = rows + GROUPS_M
        is_later = (later < n_rows) & (first_col < n_cols) & (tile + 1 < TILES)
        coming = _long_group(ptrs + GROUPS_M * stride_wm, is_later, CHUNKS, CHUNK)
        columns = ()
        for i in tl.static_range(CHUNKS):
            scale = roots[i]
            if SCALE == SCALE_MATRIX:
                scale = tl.load(scale_ptr + rows * stride_sm + offs + i * CHUNK, mask=inside, other=0.0)
            keys = tl.reshape(keys_of(weights[i], scale, everywhere, SCALE), (GROUPS * CHUNK,))
            columns += split_columns(keys, GROUPS * CHUNK, CHUNK)
        kept = kept_of(columns, N_PRUNED, GROUP)
        for i in tl.static_range(CHUNKS):
            piece = join_columns(columns_from(kept, i * CHUNK, 1, CHUNK), GROUPS * CHUNK, CHUNK)
            piece = tl.reshape(piece, (GROUPS, CHUNK))
            tl.store(ptrs + i * CHUNK, tl.where(piece, weights[i], 0.0), mask=inside)
        if MASK == MASK_BITS:
            offs_m = (matrix * n_rows + rows) * stride_mm + first_col // 8
            mask_ptrs = mask_ptr + tl.reshape(offs_m, (GROUPS,))
            for byte in tl.static_range(GROUP // 8):
                packed = kept[byte * 8].to(tl.int32)
                for bit in tl.static_range(1, 8):
                    packed |= kept[byte * 8 + bit].to(tl.int32) << bit
                tl.store(mask_ptrs + byte, packed.to(tl.uint8), mask=tl.reshape(inside, (GROUPS,)))
        weights = coming


@triton.jit
def _prune_nm_kernel(
    w_ptr, stride_we, stride_wm,
    scale_ptr, stride_se, stride_sm,
    mask_ptr, stride_mm,
    n_rows, n_cols,
    N_PRUNED: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr,  # GROUP: the power of two above m
    SCALE: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    matrix, first_row = tile_of_stack(tl.program_id(0), n_rows, BLOCK_M)
    w_ptr, scale_ptr = w_ptr + matrix * stride_we, scale_ptr + matrix * stride_se
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    first_col = tl.program_id(1) * (BLOCK_N // GROUP * M)
    slots = tl.arange(0, BLOCK_N)[None, :]
    cols = first_col + slots // GROUP * M + slots % GROUP  # [1, BLOCK_N]
    inside = (rows < n_rows) & (cols < n_cols) & (slots % GROUP < M)

    w_ptrs = w_ptr + rows * stride_wm + cols
    w = tl.load(w_ptrs, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_N]
    scale = w
    if SCALE == ROOT_VECTOR or SCALE == SCALE_MATRIX:
        # a vector has row stride 0: loaded in its own shape it would change layout through shared memory
        scale = tl.load(scale_ptr + rows * stride_sm + cols, mask=inside, other=0.0)

    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    keys = tl.reshape(keys_of(w, scale, inside, SCALE), (SIZE,))
    kept = kept_by_extraction(keys, N_PRUNED, M, SIZE, GROUP)
    kept = tl.reshape(kept, (BLOCK_M, BLOCK_N))
    tl.store(w_ptrs, tl.where(kept, w, 0.0), mask=inside)

    if MASK == MASK_BYTES:
        mask_ptrs = mask_ptr + (matrix * n_rows + rows) * stride_mm + cols
        tl.store(mask_ptrs, kept.to(tl.uint8), mask=inside)


ENOUGH_PROGRAMS = 528  # 4 for each of an H100's 132 multiprocessors


def _tile(group: int, chunk: int, n_rows: int, n_cols: int) -> dict[str, int]:
    """Rows and columns of a program in which each thread holds whole groups."""
    if group > chunk:
        tile = {"GROUPS_M": 1, "GROUPS_N": 32, "num_warps": 1}  # a group a thread
        size = 32 * group
    elif n_cols <= 512:
        tile = {"BLOCK_M": 8, "BLOCK_N": 128, "num_warps": 4}  # short rows: less padding
        size = 1024
    else:
        tile = {"BLOCK_M": 4, "BLOCK_N": 32 * chunk, "num_warps": 4}  # a warp takes 512 bytes of a row
        size = 128 * chunk
    # several rows share a root, once there are enough programs
    return tile | {"TILES": 4 if n_rows * n_cols >= 4 * ENOUGH_PROGRAMS * size else 1}


def prune_nm_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    if weight.stride(-1) != 1 and weight.shape[-1] > 1:
        prune_strided_nm_(weight, scale, n, m, mask)
    elif triton.next_power_of_2(m) == m:
        _prune_groups_in_threads_(weight, scale, n, m, mask)
    else:
        _prune_any_groups_(weight, scale, n, m, mask)


def _prune_groups_in_threads_(
    weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None
) -> None:
    n_rows, n_cols = weight.shape[-2:]
    chunk = 16 // weight.element_size()
    tile = _tile(m, chunk, n_matrices(weight) * n_rows, n_cols)
    if scale is not None and scale.dim() < weight.dim():
        # the kernel computes the roots: one launch less
        scale, stride_se, stride_sm, kind = scale.contiguous(), n_cols, 0, ROOT_VECTOR.value
    else:
        scale, stride_se, stride_sm, kind = scale_arguments(weight, scale)
    packed, stride_mm = mask_arguments(weight, mask)
    scales = (scale, stride_se, stride_sm)
    operands = (weight, *stack_strides(weight), *scales, packed, stride_mm, n_rows, n_cols)
    flags = {"SCALE": kind, "MASK": NO_MASK.value if mask is None else MASK_BITS.value}
    flags |= {"N_PRUNED": m - n, "GROUP": m, "enable_fp_fusion": False}
    # rows first: the other dimensions of a grid are limited to 65,535
    if m <= chunk:
        rows, columns = tile["BLOCK_M"] * tile["TILES"], tile["BLOCK_N"]
        grid = (n_matrices(weight) * triton.cdiv(n_rows, rows), triton.cdiv(n_cols, columns))
        _prune_short_groups_kernel[grid](*operands, **flags, **tile)
    else:
        rows, columns = tile["GROUPS_M"] * tile["TILES"], tile["GROUPS_N"] * m
        grid = (n_matrices(weight) * triton.cdiv(n_rows, rows), triton.cdiv(n_cols, columns))
        _prune_long_groups_kernel[grid](*operands, **flags, **tile, CHUNK=chunk)


def _prune_any_groups_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    n_rows, n_cols = weight.shape[-2:]
    scale, stride_se, stride_sm, kind = scale_arguments(weight, scale)
    group = triton.next_power_of_2(m)
    kept = mask
    if mask is not None:
        # a byte of the mask spans groups of several programs: write one byte a weight and pack them
        # afterwards
        kept = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    packed, stride_mm = mask_arguments(weight, kept)
    block_n = 512  # four 64-bit places a thread
    _prune_nm_kernel[(n_matrices(weight) * n_rows, triton.cdiv(n_cols // m, block_n // group))](
        weight, *stack_strides(weight), scale, stride_se, stride_sm, packed, stride_mm, n_rows, n_cols,
        N_PRUNED=m - n, M=m, GROUP=group, SCALE=kind,
        MASK=NO_MASK.value if mask is None else MASK_BYTES.value,
        BLOCK_M=1, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if kept is not mask:
        mask.copy_(pack_bits(kept))
