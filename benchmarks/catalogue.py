"""Every benchmark by name, in order of worth: a visit to a GPU may end early.

A benchmark is the BENCHMARK of `bench_<operation>.py`; an operation that the backend table has and the order
below does not comes after those that it names.
"""

from importlib import import_module
from importlib.util import find_spec

from wanda_kernels.dispatch.backends import TABLE

WORTH = (
    "prune_nm",
    "prune_rows",
    "add_coactivation",
    "add_gated_coactivation",
    "add_sq_norm",
    "sparsegpt",
    "add_hessian",
    "prune_matrix",
    "prune_variant",
)


def _benchmarks() -> dict:
    operations = [operation.rstrip("_") for operation in TABLE]
    names = [*WORTH, *(name for name in operations if name not in WORTH), "dispatch"]
    modules = {name: f"benchmarks.bench_{name}" for name in names}
    return {name: import_module(module).BENCHMARK for name, module in modules.items() if find_spec(module)}


BENCHMARKS = _benchmarks()
