"""The operations as `torch.ops.wanda_kernels.*`, which `torch.compile` does not look into.

Each operation has a schema that marks the operands it writes, a fake that writes nothing, and one
implementation for every device, `backends.run`. `Library.define` and `impl` cost 3 microseconds a
call; `torch.library.custom_op` costs 27. The library is a FRAGMENT, so that the C++ libraries can define
their own operations under the same name.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from wanda_kernels.dispatch.backends import run

SELECTION = "Tensor(a!) weight, Tensor? scale, {rule}, Tensor(b!)? mask, str backend"
SCHEMAS = {
    "add_sq_norm_": "(Tensor(a!) acc, Tensor x, Tensor? offsets, str backend) -> ()",
    "add_coactivation_": "(Tensor(a!) acc, Tensor gate, Tensor x, str? activation, int power,"
    " Tensor(b!)? sq_norm, Tensor? offsets, str backend) -> ()",
    "add_hessian_": "(Tensor(a!) acc, Tensor x, Tensor? offsets, str backend) -> ()",
    "add_gated_coactivation_": "(Tensor(a!) acc_gate, Tensor(b!) acc_up, Tensor gate, Tensor up, Tensor x,"
    " str? activation, Tensor(c!)? sq_norm, Tensor? offsets, str backend) -> ()",
    "prune_rows_": f"({SELECTION.format(rule='int num_pruned')}) -> ()",
    "prune_nm_": f"({SELECTION.format(rule='int n, int m')}) -> ()",
    "prune_matrix_": f"({SELECTION.format(rule='int rank')}) -> ()",
    "prune_variant_": f"({SELECTION.format(rule='float ratio')}) -> Tensor",
    "sparsegpt_": "(Tensor(a!) weight, Tensor upper, Tensor dead, float? ratio, int n, int m, str selector,"
    " Tensor? scale, Tensor? pruned, Tensor(b!)? mask, str backend) -> ()",
    "refine_mask_": "(Tensor weight, Tensor(a!) pruned, Tensor hessian, int n, int m, int sweeps,"
    " str backend) -> ()",
    "polish_": "(Tensor(a!) weight, Tensor dense, Tensor pruned, Tensor hessian, int steps,"
    " str backend) -> ()",
    "admm_step_": "(Tensor(a!) primal, Tensor(b!) dual, Tensor dense, Tensor(c!) pruned, int num_pruned,"
    " int n, int m, float ratio, str backend) -> Tensor",
    "packed_linear": "(Tensor x, Tensor bits, Tensor values, Tensor? offsets, Tensor? bias,"
    " str backend) -> Tensor",
    "unpack_rows": "(Tensor(a!) out, Tensor bits, Tensor values, Tensor? offsets, str backend) -> ()",
}


def _fake(operation: str, tensor: Tensor, *args: Any) -> Tensor | None:
    if operation == "prune_variant_":
        return torch.empty((), dtype=torch.float64, device=tensor.device)
    if operation == "admm_step_":
        return torch.empty((), dtype=torch.int64, device=tensor.device)
    if operation == "packed_linear":
        bits, *_ = args
        return tensor.new_empty(*tensor.shape[:-1], bits.shape[0])
    return None


library = torch.library.Library("wanda_kernels", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)
    library.impl(_name, partial(run, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"wanda_kernels::{_name}", partial(_fake, _name), lib=library)
