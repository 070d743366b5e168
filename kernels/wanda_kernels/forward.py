"""Kernels for a block's forward: the results of torch's own operations, except for rounding. No gradients.

Two kinds, each with a question that says whether it takes given operands:

- elementwise kernels, for CPUs and GPUs: `elementwise_kernels(device)` returns a module with `rms_norm`,
  `gated_product` (`takes_rows` says whether they take the operands) and `rotary` (`rotates`);
- attention and linears, for CPUs: `causal_attention` (`attends`), `sparse_linear` and `dense_linear`
  (`multiplies`).

Kernels can save the column sums of squares of their outputs: see `saving_column_squares`. On a CPU,
outputs of one megabyte and more reuse memory inside `reused_memory()`.
"""

import os
from types import ModuleType

import torch

from wanda_kernels.column_squares import saved_column_squares, saving_column_squares
from wanda_kernels.dispatch.backends import why_not
from wanda_kernels.native import forward as native_forward
from wanda_kernels.native import library
from wanda_kernels.native.forward import (
    attends,
    causal_attention,
    dense_linear,
    multiplies,
    sparse_linear,
)
from wanda_kernels.native.reused_memory import empty, reused_memory

__all__ = [
    "allows",
    "attends",
    "causal_attention",
    "dense_linear",
    "elementwise_kernels",
    "empty",
    "has_cpu_kernels",
    "multiplies",
    "reused_memory",
    "saved_column_squares",
    "saving_column_squares",
    "sparse_linear",
]


def allows(backend: str) -> bool:
    """Whether `WANDA_KERNELS_BACKEND` lets kernels of `backend` replace torch's operations in a forward."""
    return os.environ.get("WANDA_KERNELS_BACKEND", "") in ("", "auto", backend)


def has_cpu_kernels() -> bool:
    """Whether the CPU library is built and loads here."""
    return not library.why_not("cpu")


def elementwise_kernels(device: torch.device) -> ModuleType | None:
    """The module with `takes_rows`, `rms_norm`, `gated_product`, `rotates` and `rotary` for a device's
    tensors.

    Returns: None if no kernels can run there, or if `WANDA_KERNELS_BACKEND` forbids them.
    """
    if device.type == "cpu" and allows("cpu"):
        return native_forward if has_cpu_kernels() else None
    if device.type == "cuda" and allows("triton") and not why_not("add_sq_norm_", device, "triton"):
        # Triton may be absent
        from wanda_kernels.triton_ops import forward as triton_forward

        return triton_forward
    return None
