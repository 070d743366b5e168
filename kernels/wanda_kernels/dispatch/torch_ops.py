"""The operations as `torch.ops.wanda_kernels.*`: opaque to `torch.compile`, cheap to call.

`Library.define` and `impl` cost 3 microseconds a call where `torch.library.custom_op` costs 27. Each
operation is one schema that says what it writes, a fake that writes nothing, and one implementation for
every device, which asks the backend table. A FRAGMENT, so that the C++ libraries can define their own
operations beside these.
"""

from functools import partial

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
def _run(operation: str, tensor: Tensor, *args):
    if torch.is_grad_enabled():  # asked first: to enter no_grad costs some microseconds
        with torch.no_grad():
            return _run(operation, tensor, *args)
    *operands, backend = args
    device = tensor.device
    run = backends.implementation(operation, backends.choose(operation, device, backend))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            return run(tensor, *operands)
    return run(tensor, *operands)


def _fake(operation: str, tensor: Tensor, *args):
    if operation == "prune_variant_":
        return torch.empty((), dtype=torch.float64, device=tensor.device)


library = torch.library.Library("wanda_kernels", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)
    library.impl(_name, partial(_run, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"wanda_kernels::{_name}", partial(_fake, _name), lib=library)

OPERATIONS = {_name: getattr(torch.ops.wanda_kernels, _name).default for _name in SCHEMAS}


def call(operation: str, *args):
    """The operation on its operands and backend: by the registered op where a graph is traced, else at once.

    The way through the dispatcher and back into Python costs another 3 microseconds.
    """
    traced = torch.compiler.is_compiling()
    return OPERATIONS[operation](*args) if traced else _run(operation, *args)
