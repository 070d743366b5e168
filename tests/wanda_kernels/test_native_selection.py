"""The CPU library's selections equal the reference bit for bit, on each instruction set of this machine."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.wanda_kernels.native_cases import (
    DTYPES,
    ISAS,
    RECIPES,
    SCALES,
    SHAPES,
    assert_same,
    bits,
    make,
    needs_cpu,
)
from tests.wanda_kernels.stack_cases import (
    LAYOUTS,
    assert_equals_a_loop,
    random_stack,
    stack_scale,
    stored,
)
from wanda_kernels import reference
from wanda_kernels.native import ops as native
from wanda_kernels.operations import selection as operations

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_rows(isa, recipe, dtype):
    for shape in SHAPES:
        n_cols = shape[1]
        for scale in SCALES:
            weight, statistic = make(recipe, shape, dtype, scale)
            for num_pruned in {0, 1, n_cols // 2, n_cols - 1, n_cols}:
                assert_same("prune_rows_", weight, statistic, num_pruned)


@pytest.mark.parametrize("n_cols", [41, 1000])
def test_rows_unlike_their_neighbours(isa, n_cols):
    """A search begins at the last row's threshold. A bad start may cost time only."""
    weight = torch.randn(24, n_cols) * torch.logspace(-30, 30, 24)[torch.randperm(24), None]
    weight[3], weight[8] = 0.5, torch.where(torch.rand(n_cols) < 0.7, 0.0, 2.0)
    weight[11, 7], weight[12], weight[13] = 3e38, weight[12].sign(), weight[13].bfloat16()
    weight[17] = torch.where(torch.rand(n_cols) < 0.5, 1e-38, 1e38)  # a gap with ties on both sides
    weight[18] = torch.arange(n_cols).flip(0) * 2.0**-149  # subnormal, consecutive keys
    for num_pruned in {1, n_cols // 10, n_cols // 2, n_cols - 1}:
        assert_same("prune_rows_", weight, None, num_pruned)
        assert_same("prune_rows_", weight, torch.rand(n_cols), num_pruned)


@pytest.mark.parametrize("m", range(2, 33))
def test_every_n_of_m(isa, m):
    for n_groups in (1, 16, 33):  # below, at and above a vector of groups
        for recipe, dtype, scale in (("ties", torch.bfloat16, "vector"), ("normal", torch.float32, "matrix")):
            weight, statistic = make(recipe, (3, n_groups * m), dtype, scale)
            for n in range(1, m):
                assert_same("prune_nm_", weight, statistic, n, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_nm(isa, recipe, dtype):
    for n, m in ((2, 4), (4, 8), (1, 2), (8, 16), (16, 32), (3, 6)):
        for scale in SCALES:
            weight, statistic = make(recipe, (7, m * 19), dtype, scale)
            assert_same("prune_nm_", weight, statistic, n, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_matrix(isa, recipe, dtype):
    for shape in SHAPES:
        for scale in SCALES:
            weight, statistic = make(recipe, shape, dtype, scale)
            for rank in {0, weight.numel() // 2, weight.numel() - 1}:
                assert_same("prune_matrix_", weight, statistic, rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_variant(isa, recipe, dtype):
    for shape in SHAPES:
        for scale in SCALES:
            weight, statistic = make(recipe, shape, dtype, scale)
            for ratio in (0.0, 0.5, 0.9):
                assert_same("prune_variant_", weight, statistic, ratio)


def test_nan_sorts_last(isa):
    weight, scale = make("normal", (5, 130), torch.float32, "vector")
    weight[:, ::3], weight[:, 1::7] = float("nan"), -float("inf")
    scale[2] = -1.0  # its root is NaN
    for num_pruned in (40, 100):
        assert_same("prune_rows_", weight, scale, num_pruned)
    assert_same("prune_nm_", weight, scale, 3, 13)
    for rank in (10, weight.numel() - 1):  # a NaN threshold prunes nothing
        assert_same("prune_matrix_", weight, scale, rank)


def test_any_number_of_threads_gives_the_same_bits(isa):
    weight, scale = make("ties", (301, 515), torch.bfloat16, "vector")
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        assert_same("prune_rows_", weight, scale, 200)
        assert_same("prune_nm_", weight, scale, 2, 5)
        assert_same("prune_matrix_", weight, scale, 70_000)
        assert_same("prune_variant_", weight, scale, 0.4)


# more and fewer rows and columns than a tile and a vector have
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 3), (3, 35, 72), (2, 64, 17), (2, 16, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stacks(isa, layout, shape):
    for dtype, kind in product(DTYPES, ("vector", "matrix", "none")):
        weight, scale = random_stack(*shape, dtype), stack_scale(kind, *shape)
        weight[-1, ::2] = (weight[-1, ::2] * 20).round()
        assert_equals_a_loop(native.prune_rows_, "prune_rows_", weight, scale, shape[2] // 2, layout=layout)
        rule = (2, 4) if shape[2] % 4 == 0 else (1, 3)
        whole = weight[..., : shape[2] // rule[1] * rule[1]]
        scale = None if scale is None else scale[..., : whole.shape[2]]
        assert_equals_a_loop(native.prune_nm_, "prune_nm_", whole, scale, *rule, layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "transposed, every second row"])
def test_threads_that_begin_inside_an_expert(isa, layout):
    """Five threads share seven experts of 67 rows, each of 512 columns."""
    weight, scale = random_stack(7, 67, 512, torch.bfloat16), stack_scale("vector", 7, 67, 512)
    torch.set_num_threads(5)
    assert_equals_a_loop(native.prune_rows_, "prune_rows_", weight, scale, 200, layout=layout)
    assert_equals_a_loop(native.prune_nm_, "prune_nm_", weight, scale, 4, 8, layout=layout)
    _, view = stored((weight * 20).round(), layout)
    assert native.count_zeros(view) == (view == 0).sum().item()


def test_bits_of_a_nan_survive_a_copy_to_rows(isa):
    """Kept weights keep their bits in transposed storage, whatever they say."""
    weight = torch.arange(-30_000, -30_000 + 33 * 72, dtype=torch.int16).view(1, 33, 72)
    for dtype in (torch.bfloat16, torch.float16):
        _, view = stored(weight.view(dtype), "transposed")
        native.prune_rows_(view, None, 0, None)
        assert torch.equal(bits(view.contiguous()), weight)


def test_long_row(isa):
    weight, scale = make("ties", (1, 131_072), torch.bfloat16, "vector")
    for num_pruned in (1, 65_536, 131_071):
        assert_same("prune_rows_", weight, scale, num_pruned)


def test_strided_scale_matrix(isa):
    weight, _ = make("normal", (9, 40), torch.float16, None)
    wide = torch.rand(9, 64)
    assert_same("prune_rows_", weight, wide[:, :40], 11)
    assert_same("prune_rows_", weight, wide.t()[:40].t(), 11)
    assert_same("prune_rows_", weight, torch.rand(40, 9).t(), 11)  # columns contiguous: copied


def test_face_takes_cpu_and_passes_empty():
    weight, scale = make("normal", (6, 32), torch.bfloat16, "vector")
    expected = weight.clone()
    reference.prune_nm_(expected, scale, 2, 4, None)
    operations.prune_nm_(weight, scale, 2, 4, backend="cpu")
    assert torch.equal(bits(weight), bits(expected))
    operations.prune_rows_(torch.empty(0, 8), torch.ones(8), 3, backend="cpu")
    operations.prune_rows_(torch.empty(4, 0), torch.empty(0), 0, backend="cpu")


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", "mmx")
    weight, scale = make("normal", (2, 8), torch.float32, "vector")
    with pytest.raises(RuntimeError, match="mmx"):
        native.prune_rows_(weight, scale, 3, None)


def test_memory_is_checked_below_the_face():
    weight, scale = make("normal", (4, 16), torch.float32, "vector")
    with pytest.raises(RuntimeError, match="root must be contiguous with 16 elements"):
        native.prune_rows_(weight, scale[:8], 3, None)
    with pytest.raises(RuntimeError, match="root must be contiguous with 48 elements"):
        native.prune_rows_(torch.ones(3, 2, 16), torch.ones(2, 16), 3, None)
    with pytest.raises(RuntimeError, match="scale must have the weight's shape"):
        native.prune_rows_(torch.ones(3, 2, 16), torch.ones(3, 1, 16), 3, None)
    with pytest.raises(RuntimeError, match="num_pruned out of range"):
        native.prune_rows_(weight, scale, 17, None)
    with pytest.raises(RuntimeError, match="mask must be contiguous uint8"):
        native.prune_rows_(weight, scale, 3, torch.zeros(4, 1, dtype=torch.uint8))


# 800 examples of 128 rows or more: over 100,000 random rows a run, on the instruction sets in turn.
@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    isa=st.sampled_from(ISAS or ("none",)),
    recipe=st.sampled_from(RECIPES),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from(SCALES),
    n_cols=st.integers(1, 300),
    m=st.integers(2, 32),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_rows(monkeypatch, isa, recipe, dtype, scale, n_cols, m, share, seed):
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", isa)
    weight, statistic = make(recipe, (128, n_cols), dtype, scale, seed)
    assert_same("prune_rows_", weight, statistic, int(n_cols * share))
    assert_same("prune_matrix_", weight, statistic, int((weight.numel() - 1) * share))
    assert_same("prune_variant_", weight[:8], statistic if scale != "matrix" else statistic[:8], share * 0.99)
    if n_cols >= m:
        whole = n_cols // m * m
        statistic = None if statistic is None else statistic[..., :whole]
        assert_same("prune_nm_", weight[:, :whole], statistic, 1 + int((m - 2) * share), m)
