"""The CUDA library on a GPU equals the reference bit for bit, on real shapes, streams and devices."""

import pytest
import torch

from tests.wanda_kernels.native_cases import DTYPES, RECIPES, SCALES, bits, empty_mask, make
from wanda_kernels import reference
from wanda_kernels.dispatch import backends
from wanda_kernels.native import ops as native

WHY_NOT = backends.why_not("prune_rows_", "cuda", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


def assert_same(operation, weight, scale, *args):
    weight, scale = weight.cuda(), None if scale is None else scale.cuda()
    expected, expected_mask = weight.clone(), empty_mask(weight).cuda()
    getattr(reference, operation)(expected, scale, *args, expected_mask)
    mask = empty_mask(weight).cuda()
    getattr(native, operation)(weight, scale, *args, mask)
    assert torch.equal(bits(weight), bits(expected)) and torch.equal(mask, expected_mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scale", SCALES)
def test_selections(recipe, dtype, scale):
    for shape in ((1, 1), (37, 129), (64, 4096), (8, 28_672), (2, 131_072)):
        weight, statistic = make(recipe, shape, dtype, scale)
        for num_pruned in {0, 1, shape[1] // 2, shape[1]}:
            assert_same("prune_rows_", weight, statistic, num_pruned)
        assert_same("prune_matrix_", weight, statistic, weight.numel() // 2)
        assert_same("prune_variant_", weight, statistic, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sq_norm(dtype):
    x, acc = torch.randn(3, 700, 4100, device="cuda").to(dtype), torch.rand(4100, device="cuda")
    expected = acc.double() + x.double().square().sum((0, 1))
    native.add_sq_norm_(acc, x)
    torch.testing.assert_close(acc.double(), expected, rtol=1e-5, atol=0)


def test_work_follows_the_current_stream():
    weight, scale = make("normal", (512, 4096), torch.bfloat16, "vector")
    expected, stream = weight.cuda(), torch.cuda.Stream()
    reference.prune_rows_(expected, scale.cuda(), 2048, None)
    with torch.cuda.stream(stream):
        pruned, statistic = weight.cuda(), scale.cuda()
        torch.cuda._sleep(10_000_000)
        pruned.neg_()
        native.prune_rows_(pruned, statistic, 2048, None)
        pruned.neg_()
    stream.synchronize()
    assert torch.equal(pruned, expected)


def test_memory_is_checked_below_the_face():
    weight, scale = (each.cuda() for each in make("normal", (4, 16), torch.float32, "vector"))
    with pytest.raises(RuntimeError, match="root must be contiguous with 16 elements"):
        native.prune_rows_(weight, scale[:8], 3, None)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_device():
    weight, scale = make("normal", (64, 512), torch.float16, "vector")
    expected = weight.clone()
    reference.prune_rows_(expected, scale, 200, None)
    pruned = weight.to("cuda:1")
    native.prune_rows_(pruned, scale.to("cuda:1"), 200, None)
    assert torch.equal(bits(pruned.cpu()), bits(expected)) and torch.cuda.current_device() == 0
