"""The CUDA kernels' logic without a GPU: csrc/cuda is compiled for the CPU, and a block's threads are fibers.

Selections equal the reference bit for bit, in whatever order the threads run.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.native_cases import DTYPES, RECIPES, SCALES, bits, empty_mask, make
from tests.wanda_kernels.stack_cases import assert_equals_a_loop, random_stack, stack_scale
from tests.wanda_kernels.test_packed_linear import assert_close, finite_weight, random_x
from wanda_kernels import reference

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Bytes of shared memory: that of sm_89, and too little for the long rows below.
ROOMY, CRAMPED = 96 << 10, 70 << 10
COMPILER = os.environ.get("CXX", "c++").split()

pytestmark = pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="no C++ compiler")


class Operands(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("n_matrices", ctypes.c_int64),
        ("n_rows", ctypes.c_int64),
        ("n_cols", ctypes.c_int64),
        ("matrix_stride", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("root", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("scale_matrix_stride", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
    ]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
    ]
    flags += ["-I", str(CSRC), "-I", str(HERE)]
    objects = []
    for source in [HERE / "cuda_on_cpu.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([*COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]], check=True)
    library = folder / "libcuda_on_cpu.so"
    subprocess.run([*COMPILER, "-shared", *objects, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


# Every recipe in one order of the threads, and those that take the most branches in the other, too. A missing
# barrier shows in any recipe.
RECIPES_IN_ORDER = [("forward", recipe) for recipe in RECIPES]
RECIPES_IN_ORDER += [("reverse", recipe) for recipe in ("normal", "ties", "equal")]
OF_MATRICES = ("normal", "ties", "overflow", "subnormal", "signed zeros")


@pytest.fixture(params=["forward", "reverse"])
def blocks(request, emulator):
    """The emulated library. Threads run first to last, or last to first."""
    emulator.set_up(request.param == "reverse", ctypes.c_int64(ROOMY))
    return emulator


def operands(weight, scale=None, mask=None):
    """Operands, and the root whose memory they refer to."""
    root = scale.sqrt() if scale is not None and scale.dim() < weight.dim() else None
    matrix = scale if scale is not None and scale.dim() == weight.dim() else None
    root_at, scale_at, mask_at = (each if each is None else each.data_ptr() for each in (root, matrix, mask))
    stack = weight if weight.dim() == 3 else weight[None]
    shape = (CODES[weight.dtype], *stack.shape, *stack.stride()[:2])
    scale_strides = (0, 0) if matrix is None else (matrix if matrix.dim() == 3 else matrix[None]).stride()[:2]
    return Operands(weight.data_ptr(), *shape, root_at, scale_at, *scale_strides, mask_at), root


def assert_same(library, operation, weight, scale, *args):
    expected, expected_mask, mask = weight.clone(), empty_mask(weight), empty_mask(weight)
    getattr(reference, operation)(expected, scale, *args, expected_mask)
    for padding in (0, 3):  # rows on 16-byte boundaries, and not
        wide = torch.full((weight.shape[0], weight.shape[1] + padding), 7.0, dtype=weight.dtype)
        pruned = wide[:, : weight.shape[1]]
        pruned.copy_(weight)
        given, _root = operands(pruned, scale, mask)
        getattr(library, operation.rstrip("_"))(ctypes.byref(given), *map(ctypes.c_int64, args))
        said = f"{operation}{args} on {list(weight.shape)} {weight.dtype}, padding {padding}"
        assert torch.equal(bits(pruned.contiguous()), bits(expected)), said
        assert torch.equal(mask, expected_mask), said
        assert (wide[:, weight.shape[1] :] == 7.0).all(), said


def assert_same_variant(library, weight, scale, ratio):
    expected, expected_mask, mask = weight.clone(), empty_mask(weight), empty_mask(weight)
    expected_alpha = reference.prune_variant_(expected, scale, ratio, expected_mask)
    pruned = weight.clone()
    given, _root = operands(pruned, scale, mask)
    library.prune_variant.restype = ctypes.c_double
    alpha = library.prune_variant(ctypes.byref(given), ctypes.c_double(ratio))
    assert alpha == expected_alpha.item()
    assert torch.equal(bits(pruned), bits(expected)) and torch.equal(mask, expected_mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("blocks", "recipe"), RECIPES_IN_ORDER, indirect=["blocks"])
def test_rows(blocks, recipe, dtype):
    for shape in ((1, 1), (2, 7), (3, 129), (1, 2056)):
        for scale in SCALES:
            weight, statistic = make(recipe, shape, dtype, scale)
            for num_pruned in {0, shape[1] // 2, shape[1] - 1, shape[1]}:
                assert_same(blocks, "prune_rows_", weight, statistic, num_pruned)


# rows in registers, of whole vectors and not, and longer ones
@pytest.mark.parametrize("n_cols", [8, 37, 264, 2056])
@pytest.mark.parametrize(
    "layout", ["contiguous", "some rows", "every second row", "experts apart", "some columns"]
)
def test_rows_of_a_stack(blocks, layout, n_cols):
    def prune(view, scale, num_pruned, mask):
        given, _root = operands(view, scale, mask)
        blocks.prune_rows(ctypes.byref(given), ctypes.c_int64(num_pruned))

    for dtype, kind in zip(DTYPES, ("vector", "matrix", "none"), strict=True):
        weight, scale = random_stack(3, 2, n_cols, dtype), stack_scale(kind, 3, 2, n_cols)
        assert_equals_a_loop(prune, "prune_rows_", weight, scale, n_cols // 2, layout=layout)


@pytest.mark.parametrize("recipe", ["normal", "ties", "zeros"])
@pytest.mark.parametrize("shared_bytes", [ROOMY, CRAMPED])
def test_long_rows(blocks, recipe, shared_bytes):
    blocks.set_up(False, ctypes.c_int64(shared_bytes))
    weight, scale = make(recipe, (1, 17_001), torch.bfloat16, "vector")
    assert_same(blocks, "prune_rows_", weight, scale, 8500)


# Rows of whole vectors, one for each number of vectors and threads that the launcher chooses.
@pytest.mark.parametrize("n_cols", [8, 264, 1536, 8448, 12296])
def test_rows_in_registers(blocks, n_cols):
    for recipe, dtype, scale in (
        ("normal", torch.bfloat16, "vector"),
        ("ties", torch.float16, "matrix"),
        ("outliers", torch.float32, None),
    ):
        weight, statistic = make(recipe, (1, n_cols), dtype, scale)
        assert_same(blocks, "prune_rows_", weight, statistic, n_cols // 2)


@pytest.mark.parametrize("recipe", ["normal", "ties", "zeros", "equal"])
def test_rows_in_registers_of_1024_threads(blocks, recipe):
    weight, scale = make(recipe, (1, 18_944), torch.bfloat16, "vector")
    assert_same(blocks, "prune_rows_", weight, scale, 9472)


@pytest.mark.parametrize("num_pruned", [1, 700, 1400, 2047, 2048])
def test_a_threshold_among_more_ties_than_are_ranked(blocks, num_pruned):
    """One row has keys of three values, a third each. In the other the middle keys differ by a few bits."""
    column = torch.arange(2048)
    equal = torch.tensor([2.0**-20, 1.0, 1e4])[column % 3]
    close = torch.where(column % 3 == 1, equal * (1 + column % 300 * 2.0**-23), equal)
    assert_same(blocks, "prune_rows_", torch.stack([equal, close]), None, num_pruned)


def test_keys_far_below_the_highest(blocks):
    """More than half of the row is below the first histogram's window."""
    weight = torch.logspace(-38, 0, 2048, dtype=torch.float64).float()[torch.randperm(2048)][None]
    for num_pruned in (1, 1000, 1800):
        assert_same(blocks, "prune_rows_", weight, None, num_pruned)


def test_rows_that_fit_48_kib_but_for_static_memory(blocks):
    """Keys of 43 KiB and 8.4 KiB of static memory together need cudaFuncSetAttribute before the launch."""
    weight, scale = make("normal", (1, 11_007), torch.bfloat16, "vector")
    assert_same(blocks, "prune_rows_", weight, scale, 5503)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("blocks", "recipe"), [each for each in RECIPES_IN_ORDER if each[1] in OF_MATRICES], indirect=["blocks"]
)
def test_matrix(blocks, recipe, dtype):
    """Few rows, since each takes a block of 512 threads; more bytes of a mask than a block prunes."""
    for scale in ("vector", None):
        weight, statistic = make(recipe, (3, 1401), dtype, scale)
        for rank in (0, weight.numel() // 2, weight.numel() - 1):
            assert_same(blocks, "prune_matrix_", weight, statistic, rank)


def test_matrix_flushes_before_counters_overflow(blocks):
    blocks.set_up(False, ctypes.c_int64(ROOMY))
    weight = torch.ones(513 * 5, 16_385, dtype=torch.bfloat16)[:5]  # one bin, and rows of more than one piece
    assert_same(blocks, "prune_matrix_", weight.contiguous(), None, 5 * 16_385 - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("blocks", "recipe"), RECIPES_IN_ORDER, indirect=["blocks"])
def test_variant(blocks, recipe, dtype):
    for shape, scale, ratio in (((1, 1), None, 0.5), ((9, 129), "vector", 0.3), ((2, 1100), "matrix", 0.6)):
        assert_same_variant(blocks, *make(recipe, shape, dtype, scale), ratio)


@pytest.mark.parametrize("ratio", [0.0, 0.999])
def test_variant_at_the_ends_of_the_search(blocks, ratio):
    assert_same_variant(blocks, *make("normal", (2, 300), torch.float32, "vector"), ratio)


@pytest.mark.parametrize("shared_bytes", [ROOMY, CRAMPED])
def test_variant_of_long_rows(blocks, shared_bytes):
    blocks.set_up(False, ctypes.c_int64(shared_bytes))
    weight, scale = make("normal", (2, 17_001), torch.bfloat16, "vector")
    assert_same_variant(blocks, weight, scale, 0.5)


def test_variant_of_keys_far_below_the_highest(blocks):
    """More than half of a row is below the bins' window and falls into the first bin."""
    spread = torch.logspace(-38, 0, 700, dtype=torch.float64).float()[torch.randperm(700)]
    weight = torch.stack([spread, torch.where(torch.arange(700) == 3, 1.0, spread * 1e-30)])
    for ratio in (0.1, 0.5, 0.9):
        assert_same_variant(blocks, weight, None, ratio)


def test_nan_threshold_prunes_nothing(blocks):
    for dtype in DTYPES:
        weight, _ = make("normal", (5, 40), dtype, None)
        weight[2] = float("nan")
        assert_same(blocks, "prune_matrix_", weight, None, 199)
        assert_same(blocks, "prune_rows_", weight, None, 17)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (300, 37), (700, 264)])
def test_sq_norm(blocks, shape, dtype):
    x, acc = torch.randn(shape).to(dtype), torch.rand(shape[1])
    expected = acc.double() + x.double().square().sum(0)
    given, _ = operands(x)
    blocks.add_sq_norm(ctypes.byref(given), ctypes.c_void_p(acc.data_ptr()))
    torch.testing.assert_close(acc.double(), expected, rtol=1e-5, atol=0)


# none, one, more tokens than a slab; rows of no expert; offsets out of range, which nothing has checked
@pytest.mark.parametrize("offsets", [(0, 0, 1, 90, 91, 700), (3, 40, 40, 650), (0, 700), (-5, 20, 900)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sq_norm_of_segments(blocks, offsets, dtype):
    x, sums = torch.randn(700, 264).to(dtype), torch.rand(len(offsets) - 1, 300)
    expected, bounds = sums.double(), [min(max(each, 0), 700) for each in offsets]
    x[: bounds[0]] = x[bounds[-1] :] = torch.nan
    for acc, first, end in zip(expected, bounds, bounds[1:], strict=False):
        acc[:264] += x[first:end].double().square().sum(0)
    given, _ = operands(x)
    experts, pointer = torch.tensor(offsets), ctypes.c_void_p
    blocks.add_sq_norm_segments(
        ctypes.byref(given), pointer(experts.data_ptr()), ctypes.c_int64(len(sums)), pointer(sums.data_ptr()),
        ctypes.c_int64(300),
    )  # fmt: skip
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=0)


def packed_product(library, x, packed, bias=None):
    given, _ = operands(x)
    out = torch.full((len(x), len(packed.bits)), 7.0, dtype=x.dtype)
    at = [None if each is None else ctypes.c_void_p(each.data_ptr()) for each in (*packed, bias)]
    sizes = [ctypes.c_int64(each) for each in (len(packed.bits), packed.values.numel())]
    library.packed_linear(
        ctypes.byref(given), ctypes.c_void_p(out.data_ptr()), sizes[0], *at[:2], sizes[1], *at[2:]
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_linear(blocks, dtype):
    """Widths below, at and above a step of 64 columns and a chunk of 1024; with offsets and without."""
    for n_x, n_cols in ((1, 1), (2, 63), (3, 64), (4, 66), (5, 1030), (8, 1024), (7, 2085)):
        for uneven in (False, True):
            weight = finite_weight((5, n_cols), dtype, [0, n_cols, 1, n_cols // 2, 0] if uneven else None)
            packed, x = wanda_kernels.pack_rows(weight), random_x(n_x, n_cols, dtype)
            bias = random_x(1, 5, dtype)[0] if uneven else None
            got = packed_product(blocks, x, packed, bias)
            assert_close(got, x, weight, bias)
            assert torch.equal(bits(packed_product(blocks, x[:1], packed, bias)), bits(got[:1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_linear_leaves_pruned_weights_out(blocks, dtype):
    weight, x = finite_weight((5, 70), dtype), random_x(2, 70, dtype)
    packed = wanda_kernels.pack_rows(weight)
    expected, pruned = packed_product(blocks, x, packed), weight[:, 3] == 0
    for value in (torch.inf, torch.nan):
        x[1, 3] = value
        got = packed_product(blocks, x, packed)
        assert torch.equal(bits(got[:, pruned]), bits(expected[:, pruned]))
        assert torch.equal(bits(got[0]), bits(expected[0])) and not got[1, ~pruned].isfinite().any()


def test_packed_linear_with_contents_that_do_not_fit(blocks):
    """What is read stays inside of the values, whose neighbours are NaN."""
    packed, x = wanda_kernels.pack_rows(torch.ones(3, 70)), torch.ones(1, 70)
    around = torch.full((300,), torch.nan)
    values = around[100:200].fill_(2.0)
    for offsets in ([-7, 1 << 62, 99, 0], [90] * 4):
        uneven = packed._replace(values=values, offsets=torch.tensor(offsets))
        assert packed_product(blocks, x, uneven).isfinite().all()
    assert packed_product(blocks, x, packed._replace(values=values[:6])).isfinite().all()
