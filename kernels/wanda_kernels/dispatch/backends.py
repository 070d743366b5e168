"""The one table that says which backend serves which operation.

A backend is `torch` (the reference), `triton`, `cuda` (CUDA C++) or `cpu` (C++). `auto` takes the first of
the device's order that has the operation and can run here; `WANDA_KERNELS_BACKEND` replaces it.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from wanda_kernels.native import library as native

ORDER = {
    "cuda": ("triton", "cuda", "torch"),
    "cpu": ("cpu", "torch"),
}
# selections: two to four times as fast, but for the longest rows; sums: as fast, and launched in a third of
# the time
CUDA_FIRST = ("prune_rows_", "prune_matrix_", "add_sq_norm_")

# operation -> backend -> "module:function" of this package
TABLE = {
    "add_sq_norm_": {
        "torch": "reference.ops:add_sq_norm_",
        "triton": "triton_ops.add_sq_norm:add_sq_norm_",
        "cuda": "native.ops:add_sq_norm_",
        "cpu": "native.ops:add_sq_norm_",
    },
    "add_coactivation_": {
        "torch": "reference.ops:add_coactivation_",
        "triton": "triton_ops.add_coactivation:add_coactivation_",
        "cpu": "native.ops:add_coactivation_",
    },
    "add_hessian_": {
        "torch": "reference.ops:add_hessian_",
        "triton": "triton_ops.add_hessian:add_hessian_",
        "cpu": "native.ops:add_hessian_",
    },
    "add_gated_coactivation_": {
        "torch": "reference.ops:add_gated_coactivation_",
        "triton": "triton_ops.add_gated_coactivation:add_gated_coactivation_",
        "cpu": "native.ops:add_gated_coactivation_",
    },
    "prune_rows_": {
        "torch": "reference.ops:prune_rows_",
        "triton": "triton_ops.prune_rows:prune_rows_",
        "cuda": "native.ops:prune_rows_",
        "cpu": "native.ops:prune_rows_",
    },
    "prune_nm_": {
        "torch": "reference.ops:prune_nm_",
        "triton": "triton_ops.prune_nm:prune_nm_",
        "cpu": "native.ops:prune_nm_",
    },
    "prune_matrix_": {
        "torch": "reference.ops:prune_matrix_",
        "triton": "triton_ops.prune_matrix:prune_matrix_",
        "cuda": "native.ops:prune_matrix_",
        "cpu": "native.ops:prune_matrix_",
    },
    "prune_variant_": {
        "torch": "reference.ops:prune_variant_",
        "cuda": "native.ops:prune_variant_",
        "cpu": "native.ops:prune_variant_",
    },
    "sparsegpt_": {
        "torch": "reference.sparsegpt_block:sparsegpt_",
        "triton": "triton_ops.sparsegpt_block:sparsegpt_",
        "cpu": "native.ops:sparsegpt_",
    },
}

BACKENDS = ("torch", "triton", "cuda", "cpu")
TRITON_AT_LEAST = (8, 0)  # compute capability: what the Triton kernels are compiled and measured for


class BackendError(ValueError):
    """A backend was asked for by name that does not have the operation, or cannot run here."""


def choose(operation: str, device: torch.device | str, backend: str = "auto") -> str:
    """Name of the backend that serves `operation` for tensors of `device`; "cuda" is the current GPU."""
    if backend == "auto":
        backend = os.environ.get("WANDA_KERNELS_BACKEND") or "auto"
    if backend == "auto":
        return _first_available(operation, device)
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    reason = why_not(operation, device, backend)
    if reason:
        raise BackendError(f"backend {backend!r} cannot serve {operation} on {device} tensors: {reason}")
    return backend


@cache
def _first_available(operation: str, device: torch.device | str) -> str:
    return next(each for each in order(operation, device) if not why_not(operation, device, each))


def order(operation: str, device: torch.device | str) -> tuple[str, ...]:
    """The backends in the order in which `auto` asks them."""
    kind = torch.device(device).type
    if kind == "cuda" and operation in CUDA_FIRST:
        return ("cuda", *(each for each in ORDER[kind] if each != "cuda"))
    return ORDER.get(kind, ("torch",))


@cache
def why_not(operation: str, device: torch.device | str, backend: str) -> str:
    """Why `backend` cannot serve `operation` on `device`; empty where it can."""
    if backend not in TABLE[operation]:
        return "it has no such operation"
    device = torch.device(device)
    if backend in native.LIBRARIES:
        return _why_not_native(device, backend)
    if backend == "triton":
        return _why_not_triton(device)
    return ""


def _why_not_native(device: torch.device, backend: str) -> str:
    if device.type != backend:
        return f"it serves {backend} tensors"
    reason = native.why_not(backend)
    if reason or backend != "cuda":
        return reason
    return native.why_not_on_gpu(torch.cuda.current_device() if device.index is None else device.index)


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


@cache
def implementation(operation: str, backend: str) -> Callable:
    """The function behind a cell of the table."""
    module, function = TABLE[operation][backend].split(":")
    return getattr(import_module(f"wanda_kernels.{module}"), function)
