"""The checks that every operation makes before it touches anything, and their sentences."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wanda_kernels.native import ops as native
from wanda_kernels.native.ops import DTYPES
from wanda_kernels.reference.ops import ACTIVATIONS


def require_weight(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"weight's rows must be contiguous, got strides {list(weight.stride())}")


def require_scale(scale: Tensor | None, weight: Tensor) -> None:
    if scale is None:
        return
    if scale.dtype != torch.float32:
        raise ValueError(f"scale must be float32, got {scale.dtype}")
    if scale.shape not in (weight.shape, weight.shape[1:]):
        shapes = f"[{weight.shape[1]}] or {list(weight.shape)}"
        raise ValueError(f"scale must have shape {shapes} for this weight, got {list(scale.shape)}")
    require_same_device("scale", scale, weight)


def require_mask(mask: Tensor | None, weight: Tensor) -> None:
    if mask is None:
        return
    shape = [weight.shape[0], -(-weight.shape[1] // 8)]
    if mask.dtype != torch.uint8 or list(mask.shape) != shape or not mask.is_contiguous():
        raise ValueError(f"mask must be contiguous uint8 {shape}, got {mask.dtype} {list(mask.shape)}")
    require_same_device("mask", mask, weight)


def require_same_device(name: str, tensor: Tensor | None, first: Tensor) -> None:
    """Every operand lies where the first one does, which is where the operation runs."""
    if tensor is not None and tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}, the first operand on {first.device}")


def require_accumulator(acc: Tensor, shape: tuple[int, ...], name: str = "acc") -> None:
    if acc.dtype != torch.float32 or tuple(acc.shape) != shape or not acc.is_contiguous():
        got = f"{acc.dtype} {list(acc.shape)}"
        raise ValueError(f"{name} must be contiguous float32 {list(shape)}, got {got}")


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


def require_finite(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise `ValueError` at the first tensor that holds NaN or infinity, or, in a `scale`, a negative number.

    Args:
        tensors: operands by the name the sentence shall use; None is passed over. A name that ends in "scale"
            must hold no negative number. All are judged on their device and waited for once.
    """
    name = first_not_finite(tensors)
    if name is None:
        return
    tensor = tensors[name]
    where = ~tensor.isfinite() | (tensor < 0) if name.endswith("scale") else ~tensor.isfinite()
    position = tuple(where.nonzero()[0].tolist())
    raise ValueError(f"{name} holds {tensor[position].item()} at {list(position)}; nothing was pruned")


def first_not_finite(tensors: Mapping[str, Tensor | None]) -> str | None:
    """The name of the first tensor that `require_finite` would refuse; None where all are good."""
    named = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.numel()}
    bad = torch.stack([_is_bad(name, tensor) for name, tensor in named.items()]) if named else None
    return list(named)[int(bad.int().argmax())] if named and bad.any() else None


def _is_bad(name: str, tensor: Tensor) -> Tensor:
    non_negative = name.endswith("scale")
    if native.reads(tensor):
        return torch.tensor(not native.all_finite(tensor, non_negative))
    lowest, highest = torch.aminmax(tensor)  # one read, no temporary; NaN and infinities come through
    bad = ~(lowest.isfinite() & highest.isfinite())
    return bad | (lowest < 0) if non_negative else bad
