"""Every benchmark by name, in order of importance: a GPU run may end early.

A benchmark is the BENCHMARK of `ops/bench_<operation>.py`.
"""

from importlib import import_module

NAMES = (
    "prune_nm",
    "prune_rows",
    "add_coactivation",
    "add_gated_coactivation",
    "add_sq_norm",
    "sparsegpt",
    "refine_mask",
    "polish",
    "admm_step",
    "add_hessian",
    "prune_matrix",
    "prune_variant",
    "dispatch",
)
BENCHMARKS = {name: import_module(f"benchmarks.ops.bench_{name}").BENCHMARK for name in NAMES}
