"""The operations of the backends `cpu` and `cuda`: each calls `torch.ops.wanda_kernels.native_*`.

The functions take the operands that dispatch/ has checked. The library of the tensors' device must be loaded
(`library.why_not`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wanda_kernels.loops.conjugate_gradients import polish_by_steps_
from wanda_kernels.loops.mask_descent import refine_in_blocks_
from wanda_kernels.loops.sparsegpt import prune_in_blocks_
from wanda_kernels.mask_bits import as_integers
from wanda_kernels.native.library import native_op, products, squares, why_not
from wanda_kernels.native.reused_memory import empty
from wanda_kernels.native.segments import blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights and activations
ACTIVATION_CODES = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}  # enum Activation in csrc
# Rows of the Hessian in one matmul: enough to be fast, few enough to compute little below the diagonal.
HESSIAN_ROWS = 256

Product = Callable[[Tensor, Tensor, Tensor], None]
Square = Callable[[Tensor, Tensor], None]


def add_sq_norm_(acc: Tensor, x: Tensor, offsets: Tensor | None = None) -> None:
    if offsets is None:
        native_op("native_add_sq_norm_")(acc, as_rows(x))
    else:
        native_op("native_add_sq_norm_segments_")(acc, as_rows(x), offsets.long())


def add_coactivation_(
    acc: Tensor,
    gate: Tensor,
    x: Tensor,
    activation: str | None,
    power: int,
    sq_norm: Tensor | None,
    offsets: Tensor | None = None,
) -> None:
    """For each block of tokens, write abs(act(gate))^power and abs(x)^power in fp32, then add their product.

    If the CPU multiplies bf16 pairs, a bf16 model's operands are rounded to bf16. Sums stay fp32.
    """
    add_product_ = _product_for(x.dtype)
    gate, x, accs = as_rows(gate), as_rows(x), _stack(acc, offsets)
    if sq_norm is not None:
        add_sq_norm_(sq_norm, x, offsets)
    for rows, segments in blocks(len(x), offsets):
        of_gate, of_x = _activated(gate[rows], activation, power), _activated(x[rows], None, power)
        for expert, tokens in segments:
            add_product_(accs[expert], of_gate[tokens], of_x[tokens])


def add_gated_coactivation_(
    acc_gate: Tensor,
    acc_up: Tensor,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    activation: str | None,
    sq_norm: Tensor | None,
    offsets: Tensor | None = None,
) -> None:
    """As `add_coactivation_`. One pass over gate and up writes the operands of both products."""
    add_product_ = _product_for(x.dtype)
    gate, up, x = as_rows(gate), as_rows(up), as_rows(x)
    accs = _stack(acc_gate, offsets), _stack(acc_up, offsets)
    if sq_norm is not None:
        add_sq_norm_(sq_norm, x, offsets)
    for rows, segments in blocks(len(x), offsets):
        operands = empty(rows.stop - rows.start, 2 * gate.shape[1], dtype=torch.float32, device=x.device)
        native_op("native_activate_gated_")(operands, gate[rows], up[rows], ACTIVATION_CODES[activation])
        x_squared = _activated(x[rows], None, 2)
        for expert, tokens in segments:
            for acc, effects in zip(accs, operands[tokens].chunk(2, dim=1), strict=True):
                add_product_(acc[expert], effects, x_squared[tokens])


def add_hessian_(acc: Tensor, x: Tensor, offsets: Tensor | None = None) -> None:
    """Sum the diagonal and the upper triangle, then copy the upper triangle to the lower one.

    The library's product computes the sum where it is faster; otherwise torch's fp32 matmul does, in bands of
    rows. The bands are mirrored too, since a matmul's rounding need not be symmetric.
    """
    add_square_, x, accs = _square_for(x.dtype), as_rows(x), _stack(acc, offsets)
    with_tokens = set()
    for rows, segments in blocks(len(x), offsets):
        block = x[rows].float()
        for expert, tokens in segments:
            add_square_(accs[expert], block[tokens])
        with_tokens.update(expert for expert, _ in segments)
    for expert in with_tokens:
        native_op("native_mirror_")(accs[expert])


def _stack(acc: Tensor, offsets: Tensor | None) -> Tensor:
    """The sums of every expert; without offsets, those of the only one."""
    return acc.unsqueeze(0) if offsets is None else acc


def _square_for(dtype: torch.dtype) -> Square:
    """The function that adds the upper triangle of x^T x, x fp32, to acc for a model of that dtype."""
    in_bf16 = _in_bf16(dtype, squares())
    if in_bf16 is None:
        return _add_bands_
    return lambda acc, x: native_op("native_add_square_")(acc, x, in_bf16)


def _add_bands_(acc: Tensor, x: Tensor) -> None:
    for first in range(0, len(acc), HESSIAN_ROWS):
        end = min(first + HESSIAN_ROWS, len(acc))
        acc[first:end, first:].addmm_(x[:, first:end].t(), x[:, first:])


def _product_for(dtype: torch.dtype) -> Product:
    """The function that adds a^T b, both fp32, to acc for a model of that dtype."""
    in_bf16 = _in_bf16(dtype, products())
    if in_bf16 is None:
        return lambda acc, a, b: acc.addmm_(a.t(), b)
    return lambda acc, a, b: native_op("native_add_product_")(acc, a, b, in_bf16)


def _in_bf16(dtype: torch.dtype, operand_types: tuple[str, ...]) -> bool | None:
    """Whether the library's product rounds a model's operands to bf16; None if torch computes the product."""
    if dtype == torch.bfloat16 and "bf16" in operand_types:
        return True
    return False if "fp32" in operand_types else None


def _activated(x: Tensor, activation: str | None, power: int) -> Tensor:
    out = empty(*x.shape, dtype=torch.float32, device=x.device)
    native_op("native_activate_")(out, x, ACTIVATION_CODES[activation], power)
    return out


def prune_rows_(weight: Tensor, scale: Tensor | None, num_pruned: int, mask: Tensor | None) -> None:
    native_op("native_prune_rows_")(weight, *_root_or_scale(weight, scale), num_pruned, mask)


def prune_nm_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    native_op("native_prune_nm_")(weight, *_root_or_scale(weight, scale), n, m, mask)


def prune_matrix_(weight: Tensor, scale: Tensor | None, rank: int, mask: Tensor | None) -> None:
    native_op("native_prune_matrix_")(weight, *_root_or_scale(weight, scale), rank, mask)


def prune_variant_(weight: Tensor, scale: Tensor | None, ratio: float, mask: Tensor | None) -> Tensor:
    alpha = torch.empty((), dtype=torch.float64, device=weight.device)
    native_op("native_prune_variant_")(weight, *_root_or_scale(weight, scale), ratio, alpha, mask)
    return alpha


def _root_or_scale(weight: Tensor, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The root of one row of scales a matrix is computed here, once, as in the reference.

    The kernel computes the roots where each weight has a scale of its own.
    """
    if scale is None:
        return None, None
    if scale.dim() < weight.dim():
        return scale.sqrt().contiguous(), None
    return None, scale if scale.stride(-1) == 1 or scale.shape[-1] <= 1 else scale.contiguous()


def sparsegpt_(weight: Tensor, *rest) -> None:
    prune_in_blocks_(mark_lowest, sparsegpt_block, weight, *rest)


def mark_lowest(w: Tensor, u: Tensor, pruned: Tensor, selector: str, root: Tensor | None, rank: int) -> None:
    native_op("native_mark_lowest_")(w, root, _divisor(u, selector), rank, pruned)


def sparsegpt_block(
    w: Tensor, u: Tensor, pruned: Tensor, selector: str, root: Tensor | None, n: int, m: int, errors: Tensor
) -> None:
    native_op("native_sparsegpt_block_")(w, root, _divisor(u, selector), u, pruned, n, m, errors)


def _divisor(u: Tensor, selector: str) -> Tensor | None:
    """The divisors of the squared weights in SparseGPT's own score, `obs`."""
    return u.diagonal().square() if selector == "obs" else None


def refine_mask_(weight: Tensor, *rest) -> None:
    refine_in_blocks_(refine_groups, refine_swaps, weight, *rest)


def refine_groups(w: Tensor, pruned: Tensor, c: Tensor, h: Tensor, n: int, m: int) -> None:
    native_op("native_refine_groups_")(w, pruned, c, h, n, m)


def refine_swaps(w: Tensor, pruned: Tensor, c: Tensor, h: Tensor, m: int) -> None:
    native_op("native_refine_swaps_")(w, pruned, c, h, m)


def polish_(weight: Tensor, *rest) -> None:
    polish_by_steps_(polish_step, weight, *rest)


def polish_step(z: Tensor, *rest) -> None:
    native_op("native_polish_step_")(z, *rest)


def admm_step_(primal: Tensor, *rest) -> Tensor:
    return torch.tensor(native_op("native_admm_step_")(primal, *rest))


def packed_linear(
    x: Tensor, bits: Tensor, values: Tensor, offsets: Tensor | None, bias: Tensor | None
) -> Tensor:
    out = torch.empty(*x.shape[:-1], bits.shape[0], dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    native_op("native_packed_linear_")(out.view(-1, bits.shape[0]), as_rows(x), bits, values, offsets, bias)
    return out


def unpack_rows(out: Tensor, bits: Tensor, values: Tensor, offsets: Tensor | None) -> None:
    native_op("native_unpack_rows_")(as_integers(out), bits, as_integers(values), offsets)


def reads(tensor: Tensor) -> bool:
    """Whether `all_finite` and `count_zeros` take this tensor: on the CPU, of a weight's dtype, not empty."""
    fits = tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.dim() and tensor.numel()
    return bool(fits) and not why_not("cpu")


def all_finite(tensor: Tensor, non_negative: bool) -> bool:
    """Whether a tensor holds no NaN, no infinity and, if `non_negative`, no negative number."""
    return native_op("native_all_finite")(_as_stack(tensor), non_negative)


def count_zeros(tensor: Tensor) -> int:
    """The number of elements that are +0.0 or -0.0."""
    return native_op("native_count_zeros")(_as_stack(tensor))


def _as_stack(tensor: Tensor) -> Tensor:
    """Its elements, in any order, as `[rows, columns]` or `[matrices, rows, columns]`.

    Neighbours in memory become columns, so that transposed storage is read without a copy.
    """
    if tensor.dim() == 1:
        return tensor[None]
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.flatten(0, -3) if tensor.dim() > 3 else tensor


def as_rows(x: Tensor) -> Tensor:
    """`[..., features]` as `[tokens, features]` with contiguous rows; a copy only if the strides need one."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
