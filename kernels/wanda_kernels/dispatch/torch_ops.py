"""The operations as `torch.ops.wanda_kernels.*`, which `torch.compile` does not look into.

Each operation has a schema that marks the operands it writes, a fake that writes nothing, and one
implementation for every device, which chooses the backend. `Library.define` and `impl` cost 3 microseconds a
call; `torch.library.custom_op` costs 27. The library is a FRAGMENT, so that the C++ libraries can define
their own operations under the same name.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from wanda_kernels.dispatch import backends
from wanda_kernels.dispatch.precision import in_full_precision

SELECTION = "Tensor(a!) weight, Tensor? scale, {rule}, Tensor(b!)? mask, str backend"
SCHEMAS = {
    "add_sq_norm_": "(Tensor(a!) acc, Tensor x, str backend) -> ()",
    "add_coactivation_": "(Tensor(a!) acc, Tensor gate, Tensor x, str? activation, int power,"
    " Tensor(b!)? sq_norm, str backend) -> ()",
    "add_hessian_": "(Tensor(a!) acc, Tensor x, str backend) -> ()",
    "add_gated_coactivation_": "(Tensor(a!) acc_gate, Tensor(b!) acc_up, Tensor gate, Tensor up, Tensor x,"
    " str? activation, Tensor(c!)? sq_norm, str backend) -> ()",
    "prune_rows_": f"({SELECTION.format(rule='int num_pruned')}) -> ()",
    "prune_nm_": f"({SELECTION.format(rule='int n, int m')}) -> ()",
    "prune_matrix_": f"({SELECTION.format(rule='int rank')}) -> ()",
    "prune_variant_": f"({SELECTION.format(rule='float ratio')}) -> Tensor",
    "sparsegpt_": "(Tensor(a!) weight, Tensor upper, Tensor dead, float? ratio, int n, int m, str selector,"
    " Tensor? scale, Tensor? pruned, Tensor(b!)? mask, str backend) -> ()",
}


@in_full_precision
def _run(operation: str, tensor: Tensor, *args: Any) -> Tensor | None:
    # tested first: entering no_grad costs some microseconds
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _run(operation, tensor, *args)
    *operands, backend = args
    device = tensor.device
    run = backends.TABLE[operation][backends.choose_backend(operation, device, backend)]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device
        with torch.cuda.device(device):
            return run(tensor, *operands)
    return run(tensor, *operands)


def _fake(operation: str, tensor: Tensor, *args: Any) -> Tensor | None:
    if operation == "prune_variant_":
        return torch.empty((), dtype=torch.float64, device=tensor.device)
    return None


library = torch.library.Library("wanda_kernels", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)
    library.impl(_name, partial(_run, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"wanda_kernels::{_name}", partial(_fake, _name), lib=library)

REGISTERED = {_name: getattr(torch.ops.wanda_kernels, _name).default for _name in SCHEMAS}


def call(operation: str, *args: Any) -> Tensor | None:
    """Run an operation on its operands; the last argument is the backend.

    `torch.compile` traces the registered op. Every other call skips torch's dispatcher, which would cost
    another 3 microseconds.
    """
    traced = torch.compiler.is_compiling()
    return REGISTERED[operation](*args) if traced else _run(operation, *args)
