"""The checks that every operation makes before it changes an operand, and their error sentences."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wanda_kernels.mask_bits import PackedRows
from wanda_kernels.native import ops as native
from wanda_kernels.native.ops import DTYPES
from wanda_kernels.reference.activations import ACTIVATIONS


def require_selection(
    weight: Tensor, scale: Tensor | None, mask: Tensor | None, takes_stacks: bool = False
) -> None:
    """The operands that every selection takes."""
    require_weight(weight, takes_stacks)
    require_scale(scale, weight)
    require_mask(mask, weight)


def require_weight(weight: Tensor, takes_stacks: bool) -> None:
    if weight.dim() != 2 and not (takes_stacks and weight.dim() == 3):
        shapes = "[out, in] or [experts, out, in]" if takes_stacks else "[out, in]"
        raise ValueError(f"weight must be {shapes}, got shape {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if not weight.is_contiguous() and _may_overlap(weight):
        layout = f"shape {list(weight.shape)} with strides {list(weight.stride())}"
        raise ValueError(f"each element of weight must have memory of its own, got {layout}")


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a stride does not exceed what the smaller strides span."""
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= span:
            return True
        span += (size - 1) * stride
    return False


def require_scale(scale: Tensor | None, weight: Tensor) -> None:
    if scale is None:
        return
    if scale.dtype != torch.float32:
        raise ValueError(f"scale must be float32, got {scale.dtype}")
    vector = [*weight.shape[:-2], weight.shape[-1]]  # one row of scales a matrix
    if list(scale.shape) not in (vector, list(weight.shape)):
        shapes = f"{vector} or {list(weight.shape)}"
        raise ValueError(f"scale must have shape {shapes} for this weight, got {list(scale.shape)}")
    require_same_device("scale", scale, weight)


def require_mask(mask: Tensor | None, weight: Tensor) -> None:
    if mask is None:
        return
    shape = [*weight.shape[:-1], -(-weight.shape[-1] // 8)]
    if mask.dtype != torch.uint8 or list(mask.shape) != shape or not mask.is_contiguous():
        raise ValueError(f"mask must be contiguous uint8 {shape}, got {mask.dtype} {list(mask.shape)}")
    require_same_device("mask", mask, weight)


def require_same_device(name: str, tensor: Tensor | None, first: Tensor) -> None:
    """The operation runs on the device of its first operand; every other operand must be there too."""
    if tensor is not None and tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}, the first operand on {first.device}")


def require_sums(acc: Tensor, shape: tuple[int, ...], offsets: Tensor | None, name: str = "acc") -> None:
    """acc is fp32 of that shape, or with offsets a stack of such sums, an expert each."""
    if offsets is not None:
        _require_stack(acc, (len(offsets) - 1, *shape), name)
    elif acc.dtype != torch.float32 or tuple(acc.shape) != shape or not acc.is_contiguous():
        got = f"{acc.dtype} {list(acc.shape)}"
        raise ValueError(f"{name} must be contiguous float32 {list(shape)}, got {got}")


def _require_stack(acc: Tensor, shape: tuple[int, ...], name: str) -> None:
    if acc.dtype != torch.float32 or tuple(acc.shape) != shape:
        got = f"{acc.dtype} {list(acc.shape)}"
        raise ValueError(f"{name} must be float32 {list(shape)} for {shape[0]} experts, got {got}")
    if acc.numel() and (not acc[0].is_contiguous() or shape[0] > 1 and acc.stride(0) < acc[0].numel()):
        got = f"got strides {list(acc.stride())}"
        raise ValueError(f"each expert's part of {name} must be contiguous and its own, {got}")


def require_offsets(offsets: Tensor | None, x: Tensor, first: Tensor) -> None:
    """Rows offsets[e] to offsets[e + 1] of x are expert e's. The host does not wait for values on a GPU."""
    if offsets is None:
        return
    integers = offsets.dtype in (torch.int32, torch.int64)
    if not integers or offsets.dim() != 1 or not len(offsets) or not offsets.is_contiguous():
        got = f"{offsets.dtype} {list(offsets.shape)}"
        raise ValueError(f"offsets must be contiguous int32 or int64 [experts + 1], got {got}")
    if x.dim() != 2:
        raise ValueError(f"x must be [tokens, features] beside offsets, got shape {list(x.shape)}")
    require_same_device("offsets", offsets, first)
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        _require_ascending(offsets.tolist(), len(x))


def _require_ascending(offsets: list[int], n_tokens: int) -> None:
    least = 0
    for i, offset in enumerate(offsets):
        if not least <= offset <= n_tokens:
            allowed = f"from {least} to {n_tokens}, the number of tokens"
            raise ValueError(f"offsets must ascend: element {i} must be {allowed}, got {offset}")
        least = offset


def require_activations(x: Tensor, name: str = "x") -> None:
    if x.dim() < 1 or x.dtype not in DTYPES:
        got = f"{x.dtype} {list(x.shape)}"
        raise ValueError(f"{name} must be [..., features] in float32, float16 or bfloat16, got {got}")


def require_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(str(name) for name in ACTIVATIONS)
        raise ValueError(f"unknown activation {activation!r}: choose {known}")


def require_count(num_pruned: int, in_features: int) -> None:
    if not 0 <= num_pruned <= in_features:
        raise ValueError(f"num_pruned must be from 0 to in_features = {in_features}, got {num_pruned}")


def require_rank(rank: int, numel: int) -> None:
    if numel and not 0 <= rank < numel:
        raise ValueError(f"rank must be from 0 to {numel - 1} for {numel} weights, got {rank}")


def require_nm(n: int, m: int, in_features: int) -> None:
    if not 1 <= n < m <= 32:
        raise ValueError(f"n:m needs 1 <= n < m <= 32, got {n}:{m}")
    if in_features % m:
        raise ValueError(f"in_features = {in_features} is not a multiple of m = {m}")


def require_factor(upper: Tensor, dead: Tensor, weight: Tensor) -> None:
    n_cols = weight.shape[1]
    if upper.dtype != torch.float32 or list(upper.shape) != [n_cols, n_cols] or not upper.is_contiguous():
        got = f"{upper.dtype} {list(upper.shape)}"
        raise ValueError(f"factor.upper must be contiguous float32 [{n_cols}, {n_cols}], got {got}")
    if dead.dtype != torch.bool or list(dead.shape) != [n_cols]:
        raise ValueError(f"factor.dead must be bool [{n_cols}], got {dead.dtype} {list(dead.shape)}")
    require_same_device("factor.upper", upper, weight)
    require_same_device("factor.dead", dead, weight)


def require_pruned(pruned: Tensor, weight: Tensor) -> None:
    if pruned.dtype != torch.bool or pruned.shape != weight.shape:
        got = f"{pruned.dtype} {list(pruned.shape)}"
        raise ValueError(f"pruned must be bool {list(weight.shape)}, got {got}")
    if pruned.shape[1] > 1 and pruned.stride(1) != 1:
        raise ValueError(f"pruned's rows must be contiguous, got strides {list(pruned.stride())}")
    require_same_device("pruned", pruned, weight)


def require_hessian(hessian: Tensor, weight: Tensor) -> None:
    n_cols = weight.shape[1]
    if (
        hessian.dtype != torch.float32
        or list(hessian.shape) != [n_cols, n_cols]
        or not hessian.is_contiguous()
    ):
        got = f"{hessian.dtype} {list(hessian.shape)}"
        raise ValueError(f"hessian must be contiguous float32 [{n_cols}, {n_cols}], got {got}")
    require_same_device("hessian", hessian, weight)


def require_dampable(hessian: Tensor, dampening: float) -> None:
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != torch.float32:
        raise ValueError(f"hessian must be float32 [in, in], got {hessian.dtype} {list(hessian.shape)}")
    if not dampening > 0:
        raise ValueError(f"dampening must be positive, got {dampening}")
    require_finite({"hessian": hessian})


def require_packed(packed: PackedRows, in_features: int, device: torch.device) -> None:
    """Shapes, dtypes and devices. What bits and offsets hold is not read."""
    bits, values, offsets = packed
    if bits.dtype != torch.uint8 or bits.dim() not in (2, 3) or not bits.is_contiguous():
        got = f"{bits.dtype} {list(bits.shape)}"
        raise ValueError(f"bits must be contiguous uint8 [out, bytes] or [experts, out, bytes], got {got}")
    if bits.shape[-1] != (in_features + 7) // 8:
        needed = f"{(in_features + 7) // 8} bytes a row for {in_features} columns"
        raise ValueError(f"bits must have {needed}, got shape {list(bits.shape)}")
    _require_values(values, offsets, bits, in_features)
    for name, tensor in (("bits", bits), ("values", values), ("offsets", offsets)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the first operand on {device}")


def _require_values(values: Tensor, offsets: Tensor | None, bits: Tensor, in_features: int) -> None:
    rows = bits.shape[:-1]
    if not values.is_contiguous() or values.element_size() not in (1, 2, 4, 8):
        got = f"{values.dtype} {list(values.shape)} with strides {list(values.stride())}"
        raise ValueError(f"values must be contiguous elements of 1, 2, 4 or 8 bytes, got {got}")
    if offsets is None:
        if values.shape[:-1] != rows or values.shape[-1] > in_features:
            got = f"got {list(values.shape)} for {in_features} columns"
            shape = ", ".join(map(str, rows))
            raise ValueError(f"values must be [{shape}, kept] without offsets, {got}")
        return
    if values.dim() != 1:
        raise ValueError(f"values must have 1 dimension beside offsets, got shape {list(values.shape)}")
    size = rows.numel() + 1
    if offsets.dtype != torch.int64 or list(offsets.shape) != [size] or not offsets.is_contiguous():
        got = f"{offsets.dtype} {list(offsets.shape)}"
        raise ValueError(f"offsets must be contiguous int64 [{size}] for bits {list(bits.shape)}, got {got}")


def require_like(name: str, tensor: Tensor, first: Tensor) -> None:
    """A contiguous fp32 operand of the first one's shape."""
    if tensor.dtype != torch.float32 or tensor.shape != first.shape or not tensor.is_contiguous():
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} must be contiguous float32 {list(first.shape)}, got {got}")
    require_same_device(name, tensor, first)


def require_finite_operands(weight: Tensor, scale: Tensor | None) -> None:
    try:
        require_finite({"weight": weight}, non_negative={"scale": scale})
    except ValueError as error:
        raise ValueError(f"{error}; this weight was not changed") from None


def require_finite(
    tensors: Mapping[str, Tensor | None], non_negative: Mapping[str, Tensor | None] | None = None
) -> None:
    """Raise `ValueError` at the first tensor that holds a value which no operation accepts.

    Args:
        tensors: must be finite. The keys are labels: the error sentence names the tensor by its label, and a
            label has no other effect. None is skipped. Any shape and floating dtype, on one device; the
            device computes all verdicts and the host waits for it once.
        non_negative: the same for tensors that must be finite and not negative, such as scales.

    Raises: `ValueError` with the label, the value and its position, for the first bad tensor in the order of
        `tensors`, then `non_negative`.
    """
    found = _first_bad(tensors, non_negative or {})
    if found is None:
        return
    name, tensor, not_negative = found
    bad = ~tensor.isfinite()
    if not_negative:
        bad |= tensor < 0
    position = tuple(bad.nonzero()[0].tolist())
    raise ValueError(f"{name} holds {tensor[position].item()} at {list(position)}")


def first_not_finite(
    tensors: Mapping[str, Tensor | None], non_negative: Mapping[str, Tensor | None] | None = None
) -> str | None:
    """The label of the first tensor that `require_finite` would refuse.

    Args:
        tensors, non_negative: as in `require_finite`.

    Returns: the label; None if every tensor is accepted.
    """
    found = _first_bad(tensors, non_negative or {})
    return found and found[0]


def _first_bad(
    tensors: Mapping[str, Tensor | None], non_negative: Mapping[str, Tensor | None]
) -> tuple[str, Tensor, bool] | None:
    """(label, tensor, whether it must not be negative) of the first bad tensor."""
    every = [(name, tensor, False) for name, tensor in tensors.items()]
    every += [(name, tensor, True) for name, tensor in non_negative.items()]
    every = [each for each in every if each[1] is not None and each[1].numel()]
    if not every:
        return None
    bad = torch.stack([_is_bad(tensor, not_negative) for _, tensor, not_negative in every])
    return every[int(bad.int().argmax())] if bad.any() else None


def _is_bad(tensor: Tensor, non_negative: bool) -> Tensor:
    if native.reads(tensor):
        return torch.tensor(not native.all_finite(tensor, non_negative))
    # one read and no temporary; NaN and infinities come through
    lowest, highest = torch.aminmax(tensor)
    bad = ~(lowest.isfinite() & highest.isfinite())
    return bad | (lowest < 0) if non_negative else bad


def count_zeros(tensor: Tensor) -> Tensor:
    """Count the elements that are +0.0 or -0.0.

    Args:
        tensor: any shape and dtype, on any device; it is read once.

    Returns: int64 `[]` on the tensor's device; the host does not wait for a GPU.
    """
    if native.reads(tensor):
        return torch.tensor(native.count_zeros(tensor))
    # a sum of bools would copy them as int64
    return tensor.numel() - tensor.count_nonzero()
