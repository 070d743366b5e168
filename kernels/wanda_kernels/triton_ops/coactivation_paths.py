"""Which way `add_coactivation_` takes on a GPU: measured for sm_90, estimated for sm_80 (see LOG.md)."""

# compute capability at least, out * in features at least, path; the first row that fits
PATHS = (
    (
        (9, 0),
        0,
        "addmm",
    ),  # wgmma waits for operands that pass through registers: elementwise first, then cuBLAS
    ((8, 0), 108 * 128 * 256, "fused"),  # mma.sync takes operands from registers, so abs and silu are free
    ((8, 0), 0, "addmm"),  # fewer tiles than an A100 has multiprocessors: cuBLAS splits the tokens
)


def path(capability: tuple[int, int], out_features: int, in_features: int) -> str:
    """Either "fused" or "addmm", by the first row of the table that fits; "fused" where none does."""
    for least_capability, least_elements, name in PATHS:
        if capability >= least_capability and out_features * in_features >= least_elements:
            return name
    return "fused"
