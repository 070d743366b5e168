"""The table of the function that serves an operation on a backend, the choice of a backend, and the call.

A backend is `cpu` (C++), `cuda` (CUDA C++), `triton`, or `torch`, the reference. `WANDA_KERNELS_BACKEND`
replaces "auto" as the default of every call.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from wanda_kernels import reference
from wanda_kernels.dispatch.precision import in_full_precision
from wanda_kernels.native import library
from wanda_kernels.native import ops as native

BACKENDS = ("torch", "triton", "cuda", "cpu")
DEVICE_OF = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # torch serves every device
TRITON_AT_LEAST = (8, 0)  # compute capability: what the Triton kernels are compiled and measured for

# Triton is imported at the first call that needs it: it may be absent, it takes time, and it reads
# TRITON_INTERPRET when it is imported.


def _triton_add_sq_norm_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.add_sq_norm import add_sq_norm_

    add_sq_norm_(*operands)


def _triton_add_coactivation_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.add_coactivation import add_coactivation_

    add_coactivation_(*operands)


def _triton_add_gated_coactivation_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.add_gated_coactivation import add_gated_coactivation_

    add_gated_coactivation_(*operands)


def _triton_add_hessian_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.add_hessian import add_hessian_

    add_hessian_(*operands)


def _triton_prune_rows_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.prune_rows import prune_rows_

    prune_rows_(*operands)


def _triton_prune_nm_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.prune_nm import prune_nm_

    prune_nm_(*operands)


def _triton_prune_matrix_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.prune_matrix import prune_matrix_

    prune_matrix_(*operands)


def _triton_sparsegpt_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.sparsegpt_block import sparsegpt_

    sparsegpt_(*operands)


def _triton_refine_mask_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.refine_mask import refine_mask_

    refine_mask_(*operands)


def _triton_polish_(*operands: Any) -> None:
    from wanda_kernels.triton_ops.polish_step import polish_

    polish_(*operands)


def _triton_admm_step_(*operands: Any) -> Tensor:
    from wanda_kernels.triton_ops.admm_step import admm_step_

    return admm_step_(*operands)


# operation -> backend -> function. "auto" takes the first backend of a row that serves the operands' device
# and can run here. On GPUs the order is by measurement: the CUDA selections take half to a quarter of
# Triton's time for all but the longest rows, and serve those too; the CUDA sum of squares is as fast as
# Triton's and is launched in a third of the time.
TABLE: dict[str, dict[str, Callable[..., Any]]] = {
    "add_sq_norm_": {
        "cpu": native.add_sq_norm_,
        "cuda": native.add_sq_norm_,
        "triton": _triton_add_sq_norm_,
        "torch": reference.add_sq_norm_,
    },
    "add_coactivation_": {
        "cpu": native.add_coactivation_,
        "triton": _triton_add_coactivation_,
        "torch": reference.add_coactivation_,
    },
    "add_hessian_": {
        "cpu": native.add_hessian_,
        "triton": _triton_add_hessian_,
        "torch": reference.add_hessian_,
    },
    "add_gated_coactivation_": {
        "cpu": native.add_gated_coactivation_,
        "triton": _triton_add_gated_coactivation_,
        "torch": reference.add_gated_coactivation_,
    },
    "prune_rows_": {
        "cpu": native.prune_rows_,
        "cuda": native.prune_rows_,
        "triton": _triton_prune_rows_,
        "torch": reference.prune_rows_,
    },
    "prune_nm_": {
        "cpu": native.prune_nm_,
        "triton": _triton_prune_nm_,
        "torch": reference.prune_nm_,
    },
    "prune_matrix_": {
        "cpu": native.prune_matrix_,
        "cuda": native.prune_matrix_,
        "triton": _triton_prune_matrix_,
        "torch": reference.prune_matrix_,
    },
    "prune_variant_": {
        "cpu": native.prune_variant_,
        "cuda": native.prune_variant_,
        "torch": reference.prune_variant_,
    },
    "sparsegpt_": {
        "cpu": native.sparsegpt_,
        "triton": _triton_sparsegpt_,
        "torch": reference.sparsegpt_,
    },
    "refine_mask_": {
        "cpu": native.refine_mask_,
        "triton": _triton_refine_mask_,
        "torch": reference.refine_mask_,
    },
    "polish_": {
        "cpu": native.polish_,
        "triton": _triton_polish_,
        "torch": reference.polish_,
    },
    "admm_step_": {
        "cpu": native.admm_step_,
        "triton": _triton_admm_step_,
        "torch": reference.admm_step_,
    },
    "packed_linear": {
        "cpu": native.packed_linear,
        "torch": reference.packed_linear,
    },
    "unpack_rows": {
        "cpu": native.unpack_rows,
        "torch": reference.unpack_rows,
    },
}
OPERATIONS = tuple(TABLE)
# These take weights with contiguous rows alone; "auto" takes the next backend for transposed storage.
NEEDS_ROWS = {("prune_rows_", "cuda")}


class BackendError(ValueError):
    """The named backend does not exist, lacks the operation, or cannot run on this machine."""


def call(operation: str, *args: Any) -> Tensor | None:
    """`run`, by way of the registered op if `torch.compile` traces the caller.

    Every other call skips torch's dispatcher, which would cost another 3 microseconds.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.wanda_kernels, operation).default(*args)
    return run(operation, *args)


def call_on_rows(
    operation: str, weight: Tensor, *args: Any, by: Callable[..., Tensor | None] | None = None
) -> Tensor | None:
    """`call` for operations on one matrix with contiguous rows; of another weight it prunes a copy.

    Args:
        by: in place of `call`: `run`, for operands that torch's dispatcher does not take.
    """
    by = by or call
    if has_rows(weight):
        return by(operation, weight, *args)
    with torch.no_grad():
        rows = weight.contiguous()
        result = by(operation, rows, *args)
        weight.copy_(rows)
    return result


def has_rows(weight: Tensor) -> bool:
    return weight.stride(-1) == 1 or weight.shape[-1] <= 1


@in_full_precision
def run(operation: str, tensor: Tensor, *args: Any) -> Tensor | None:
    """Run an operation on its operands; the last argument is the backend. No graph is kept for gradients."""
    # tested first: entering no_grad costs some microseconds
    if torch.is_grad_enabled():
        with torch.no_grad():
            return run(operation, tensor, *args)
    *operands, backend = args
    device = tensor.device
    chosen = choose_backend(operation, device, backend)
    if (operation, chosen) in NEEDS_ROWS and not has_rows(tensor):
        chosen = _without_rows(operation, tensor, chosen, backend)
    function = TABLE[operation][chosen]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device
        with torch.cuda.device(device):
            return function(tensor, *operands)
    return function(tensor, *operands)


def choose_backend(operation: str, device: torch.device | str, backend: str = "auto") -> str:
    """The name of the backend that serves an operation.

    Args:
        operation: one of `OPERATIONS`.
        device: where the operands are; "cuda" is the current GPU.
        backend: "auto", or the one backend that must serve. "auto" is `WANDA_KERNELS_BACKEND` if that is set,
            else the first backend of the operation's row in the table that can serve.

    Returns: "cpu", "cuda", "triton" or "torch".
    Raises: `BackendError`, which says why the named backend cannot serve.
    """
    backend = _or_environment(backend)
    if backend == "auto":
        return _first_available(operation, device)
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    reason = why_not(operation, device, backend)
    if reason:
        raise BackendError(f"backend {backend!r} cannot serve {operation} on {device} tensors: {reason}")
    return backend


def _or_environment(backend: str) -> str:
    return os.environ.get("WANDA_KERNELS_BACKEND") or "auto" if backend == "auto" else backend


def _without_rows(operation: str, weight: Tensor, chosen: str, backend: str) -> str:
    """The backend for a weight whose layout the chosen one does not take."""
    if _or_environment(backend) != "auto":
        reason = f"its rows must be contiguous, got strides {list(weight.stride())}"
        raise BackendError(f"backend {chosen!r} cannot serve {operation} on this weight: {reason}")
    others = (each for each in order(operation, weight.device) if (operation, each) not in NEEDS_ROWS)
    return next(each for each in others if not why_not(operation, weight.device, each))


@cache
def _first_available(operation: str, device: torch.device | str) -> str:
    return next(each for each in order(operation, device) if not why_not(operation, device, each))


def order(operation: str, device: torch.device | str) -> tuple[str, ...]:
    """The backends that "auto" tries, in turn. It never interprets Triton kernels on a CPU."""
    kind = torch.device(device).type
    return tuple(each for each in TABLE[operation] if DEVICE_OF.get(each, kind) == kind)


@cache
def why_not(operation: str, device: torch.device | str, backend: str) -> str:
    """Why `backend` cannot serve `operation` on `device`; empty if it can."""
    if backend not in TABLE[operation]:
        return "it has no such operation"
    device = torch.device(device)
    if backend in library.LIBRARIES:
        return _why_not_native(device, backend)
    if backend == "triton":
        return _why_not_triton(device)
    return ""


def _why_not_native(device: torch.device, backend: str) -> str:
    if device.type != backend:
        return f"it serves {backend} tensors"
    reason = library.why_not(backend)
    if reason or backend != "cuda":
        return reason
    return library.why_not_on_gpu(torch.cuda.current_device() if device.index is None else device.index)


def _why_not_triton(device: torch.device) -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < TRITON_AT_LEAST:
            return f"it needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for GPUs; with TRITON_INTERPRET=1 it interprets, slowly, on the CPU"
    return ""
