"""The CPU library's `sparsegpt_block` and `mark_lowest` equal the reference, on each instruction set."""

import pytest
import torch

from tests.wanda_kernels.native_cases import ISAS, bits, needs_cpu
from wanda_kernels.native import ops as native
from wanda_kernels.reference import sparsegpt_block as reference_sparsegpt

pytestmark = needs_cpu
SELECTORS = ("obs", "wanda", "magnitude")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", request.param)
    return request.param


def make(n_rows: int, width: int, seed: int = 0):
    """(w, u, pruned, root): views of larger matrices, with ties and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n_rows, width + 9, generator=generator)[:, 5 : width + 5]
    w[:, ::3] = w[:, ::3].round()
    w[:, 1::8] *= -0.0
    u = (torch.randn(width + 7, width + 7, generator=generator) / 10).triu() + torch.eye(width + 7)
    pruned = torch.rand(n_rows, width + 3, generator=generator)[:, 2 : width + 2] < 0.5
    return w, u[:width, :width], pruned, torch.rand(width, generator=generator)


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, cut from a copy of the whole matrix."""
    return tensor._base.clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_same_block(n_rows, width, selector, n, m, seed=0):
    w, u, pruned, root = make(n_rows, width, seed)
    root = root if selector == "wanda" else None
    expected, got = (copy(w), pruned.clone()), (copy(w), pruned.clone())
    errors = torch.full((2, n_rows, width), float("nan"))
    reference_sparsegpt.sparsegpt_block(expected[0], u, expected[1], selector, root, n, m, errors[0])
    native.sparsegpt_block(got[0], u, got[1], selector, root, n, m, errors[1])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(bits(got[0].contiguous()), bits(expected[0].contiguous()))
    assert torch.equal(bits(errors[0]), bits(errors[1]))
    around = torch.ones_like(w._base, dtype=torch.bool)
    around[:, 5 : width + 5] = False
    assert torch.equal(got[0]._base[around], w._base[around])


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("m", range(2, 33))
def test_every_group(isa, m, selector):
    for n in {1, m // 2, m - 1} - {0}:
        assert_same_block(19, 128 // m * m, selector, n, m)


@pytest.mark.parametrize("width", (1, 7, 8, 15, 16, 17, 31, 33, 63, 100, 127, 128))
def test_every_width_with_a_given_mask(isa, width):
    for n_rows in (1, 8, 15, 16, 33):
        assert_same_block(n_rows, width, "magnitude", 0, 0, seed=n_rows)


@pytest.mark.parametrize("selector", SELECTORS)
def test_threshold_of_a_block(isa, selector):
    for n_rows, width in ((1, 1), (3, 37), (40, 128), (700, 128)):
        w, u, pruned, root = make(n_rows, width)
        root = root if selector == "wanda" else None
        for rank in {0, w.numel() // 2, w.numel() - 1}:
            expected, got = pruned.clone(), pruned.clone()
            reference_sparsegpt.mark_lowest(w, u, expected, selector, root, rank)
            native.mark_lowest(w, u, got, selector, root, rank)
            assert torch.equal(got, expected) and got.sum() > rank


def test_any_number_of_threads_gives_the_same_bits(isa):
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            assert_same_block(301, 64, "obs", 2, 4)
    finally:
        torch.set_num_threads(threads)


def test_scores_that_overflow(isa):
    """Infinite scores are equal. NaN sorts last, and a NaN threshold prunes nothing."""
    w, u, pruned, _ = make(9, 32)
    w[:, ::2] *= 1e30
    w[3] = float("nan")
    for rank in (5, 200, w.numel() - 1):
        expected, got = pruned.clone(), pruned.clone()
        reference_sparsegpt.mark_lowest(w, u, expected, "obs", None, rank)
        native.mark_lowest(w, u, got, "obs", None, rank)
        assert torch.equal(got, expected)
    assert not got.any()


def test_memory_is_checked_below_the_face():
    w, u, pruned, root = make(4, 16)
    errors = torch.empty(4, 16)
    for arguments, sentence in (
        ((w, u[:15, :15], pruned, "magnitude", None, 2, 4, errors), r"u must be \[width, width\]"),
        ((w, u, pruned[:3], "obs", None, 2, 4, errors), "pruned must be bool with w's shape"),
        ((w, u, pruned, "wanda", root[:9], 2, 4, errors), "root must be contiguous with 16 elements"),
        ((w, u, pruned, "obs", None, 2, 5, errors), "n:m does not fit"),
        ((w, u, pruned, "obs", None, 2, 4, errors[:3]), "errors must be contiguous with 64 elements"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            native.sparsegpt_block(*arguments)
    with pytest.raises(RuntimeError, match="rank out of range"):
        native.mark_lowest(w, u, pruned, "obs", None, 64)
