"""On a GPU: linears of real models, each backend against the reference, and more than 2^31 weights."""

from functools import partial

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.stack_cases import LAYOUTS, assert_equals_a_loop
from wanda_kernels import reference
from wanda_kernels.dispatch import backends

pytestmark = pytest.mark.gpu
SHAPES = (
    (2048, 8192),
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (4096, 14336),
    (1024, 28672),
    (256, 53248),
)
RULES = (
    ("prune_rows_", lambda weight: (weight.shape[1] // 2,)),
    ("prune_nm_", lambda weight: (2, 4)),
    ("prune_nm_", lambda weight: (4, 8)),
    ("prune_nm_", lambda weight: (16, 32)),
    ("prune_matrix_", lambda weight: (weight.numel() // 2,)),
    ("prune_variant_", lambda weight: (0.5,)),
)
GPU_BACKENDS = ("triton", "cuda")


def serves(operation: str, backend: str) -> bool:
    return not backends.why_not(operation, "cuda", backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("operation, rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_selection_equals_reference_bit_for_bit(shape, operation, rule, backend):
    if not serves(operation, backend):
        pytest.skip(backends.why_not(operation, "cuda", backend))
    weight = torch.randn(shape, device="cuda").mul_(0.02).bfloat16()
    for scale in (None, torch.rand(shape[1], device="cuda"), torch.rand(shape, device="cuda")):
        expected, got = weight.clone(), weight.clone()
        masks = torch.full((2, shape[0], shape[1] // 8), 0xA5, dtype=torch.uint8, device="cuda")
        returned = getattr(reference, operation)(expected, scale, *rule(weight), masks[0])
        value = getattr(wanda_kernels, operation)(got, scale, *rule(weight), mask=masks[1], backend=backend)
        assert torch.equal(got, expected) and torch.equal(masks[0], masks[1])
        assert returned is None or returned.item() == value.item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((8, 768, 2048), (4, 2880, 2880), (2, 512, 8200)))
@pytest.mark.parametrize(
    "operation, rule", (("prune_rows_", (1000,)), ("prune_nm_", (2, 4)), ("prune_nm_", (4, 8)))
)
def test_stacks_equal_a_loop_over_experts(operation, rule, shape, layout):
    weight = torch.randn(shape, device="cuda").mul_(0.02).bfloat16()
    for scale in (None, torch.rand(shape[0], shape[2], device="cuda"), torch.rand(shape, device="cuda")):
        for backend in ("auto", "triton"):  # auto: CUDA C++ where it takes the layout
            run = partial(getattr(wanda_kernels, operation), backend=backend)
            assert_equals_a_loop(run, operation, weight, scale, *rule, layout=layout)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("operation, rule", (("prune_rows_", (16_384,)), ("prune_nm_", (2, 4))))
def test_more_than_2_to_the_31_weights(operation, rule, backend):
    if not serves(operation, backend):
        pytest.skip(backends.why_not(operation, "cuda", backend))
    weight = torch.empty(70_000, 32_768, dtype=torch.bfloat16, device="cuda").normal_()
    last = weight[-100:].clone()
    getattr(reference, operation)(last, None, *rule, None)
    getattr(wanda_kernels, operation)(weight, None, *rule, backend=backend, check_finite=False)
    assert torch.equal(weight[-100:], last)
    assert (weight == 0).sum().item() >= weight.numel() // 2


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sums(dtype, backend):
    x, gate = (torch.randn(16_384, n, device="cuda").to(dtype) for n in (4096, 11008))
    exact = torch.zeros(4096, dtype=torch.float64, device="cuda").add_(x.double().square().sum(0)).float()
    if serves("add_sq_norm_", backend):
        acc = torch.zeros(4096, device="cuda")
        wanda_kernels.add_sq_norm_(acc, x, backend=backend)
        torch.testing.assert_close(acc, exact, rtol=2e-6, atol=0)
    if serves("add_coactivation_", backend):
        acc, sq_norm = torch.zeros(11008, 4096, device="cuda"), torch.zeros(4096, device="cuda")
        wanda_kernels.add_coactivation_(acc, gate, x, sq_norm=sq_norm, backend=backend)
        expected = torch.zeros_like(acc)
        reference.add_coactivation_(expected, gate, x, "silu", 1, None)
        torch.testing.assert_close(acc, expected, rtol=2**-8, atol=0)
        torch.testing.assert_close(sq_norm, exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("activation", ("silu", "gelu", "gelu_tanh", "relu", None))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sums_of_a_gated_mlp(dtype, activation):
    gate, up, x = (torch.randn(8192, n, device="cuda").to(dtype) for n in (11008, 11008, 4096))
    accs, expected = torch.zeros(2, 2, 11008, 4096, device="cuda")
    wanda_kernels.add_gated_coactivation_(*accs, gate, up, x, activation, backend="triton")
    reference.add_gated_coactivation_(*expected, gate, up, x, activation, None)
    torch.testing.assert_close(accs, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("power", (1, 2))
@pytest.mark.parametrize("activation", ("silu", "gelu", "gelu_tanh", "relu", None))
def test_both_paths_of_the_coactivation_agree(activation, power):
    from wanda_kernels.triton_ops import add_coactivation

    x, gate = (torch.randn(4096, n, device="cuda").bfloat16() for n in (2048, 3000))
    sums = torch.zeros(2, 3000, 2048, device="cuda")
    add_coactivation.add_fused_(sums[0], gate, x, activation, power)
    add_coactivation.add_addmm_(sums[1], gate, x, activation, power, None)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", ((4096, 4096), (1024, 11008), (1000, 4095)))
@pytest.mark.parametrize("pattern", (0.5, "2:4", "4:8", "12:24"))
def test_sparsegpt_equals_reference_bit_for_bit(shape, pattern):
    n_rows, n_cols = shape
    m = int(pattern.split(":")[1]) if isinstance(pattern, str) else 1
    n_cols = n_cols // m * m
    x = torch.randn(2 * n_cols, n_cols, device="cuda").bfloat16()
    hessian = torch.zeros(n_cols, n_cols, device="cuda")
    wanda_kernels.add_hessian_(hessian, x)
    factor = wanda_kernels.factor_hessian(hessian)
    weights = torch.randn(n_rows, n_cols, device="cuda").mul_(0.02).expand(2, -1, -1).clone()
    masks = torch.full((2, n_rows, -(-n_cols // 8)), 0xA5, dtype=torch.uint8, device="cuda")
    for weight, mask, backend in zip(weights, masks, ("torch", "triton"), strict=True):
        wanda_kernels.sparsegpt_(weight, factor, pattern, mask=mask, backend=backend)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(weights[0].view(torch.int32), weights[1].view(torch.int32))
