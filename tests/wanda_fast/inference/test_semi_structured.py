"""`accelerate` on a CPU, with another conversion and another clock; and on a GPU, if there is one."""

import pytest
import torch
from torch import nn

import wanda_fast
from wanda_fast.errors import DeviceError
from wanda_fast.inference import semi_structured


class Marked(torch.Tensor):
    """A converted weight."""


def convert(weight):
    if weight.shape[1] % 64:
        raise RuntimeError("shape is not supported\nsecond line")
    assert not (weight.view(torch.int32) == -(2**31)).any(), "a -0.0 would be taken for a value"
    return weight.clone().as_subclass(Marked)


def clock(dense, sparse):
    def medians(calls, device):
        assert {name: call().shape[-2:] for name, call in calls.items()}.keys() == {"dense", "sparse"}
        return {"dense": dense, "sparse": sparse}

    return medians


def model():
    generator = torch.Generator().manual_seed(0)
    linears = (nn.Linear(128, 64), nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    built = nn.Sequential(*linears, nn.Tanh())
    for linear in (built[0], built[1], built[2]):
        weight = torch.randn(linear.weight.shape, generator=generator)
        weight.view(-1, 4)[:, 1:3] = -0.0
        linear.weight = nn.Parameter(weight)
    return built


def weights(built):
    return [each.weight for each in built if isinstance(each, nn.Linear)]


def test_two_of_four_linears_are_changed_where_sparse_wins():
    built = model()
    x = torch.randn(3, 128)
    before = built(x)
    found = semi_structured._accelerate(built, 8, convert, clock(dense=2e-3, sparse=1e-3))
    # The fourth linear is dense, torch has no product for the third one's shape.
    assert [type(each) is nn.Parameter for each in weights(built)] == [False, False, True, True]
    assert list(found) == ["0", "1", "2"]
    assert found["0"] == semi_structured.LinearTiming((64, 128), 2.0, 1.0, "sparse")
    assert found["2"] == semi_structured.LinearTiming((64, 32), None, None, "dense", "shape is not supported")
    torch.testing.assert_close(built(x), before)


@pytest.mark.parametrize("sparse", [1e-3, 0.99e-3, 5e-3])
def test_a_model_where_none_wins_is_left_as_it_was(sparse):
    built = model()
    before = weights(built)
    found = semi_structured._accelerate(built, 8, convert, clock(dense=1e-3, sparse=sparse))
    assert all(one is other for one, other in zip(weights(built), before, strict=True))
    assert {each.chosen for each in found.values()} == {"dense"}
    assert found["0"].reason == f"sparse is {1e-3 / sparse:.2f} times as fast"


@pytest.mark.parametrize("factor", [2, float("nan")])
def test_a_wrong_product_is_not_chosen(factor):
    built = model()
    found = semi_structured._accelerate(built, 8, lambda weight: factor * convert(weight), clock(2e-3, 1e-3))
    assert found["0"].chosen == "dense" and "differs from the dense one" in found["0"].reason


def test_linears_of_one_shape_share_a_timing():
    built = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    for linear in built:
        linear.weight.data[:, ::2] = 0
    timed = []

    def medians(calls, device):
        timed.append(device)
        return dict.fromkeys(calls, 1.0)

    semi_structured._accelerate(built, 4, convert, medians)
    assert timed == ["cpu"]


def test_without_a_gpu_it_is_one_sentence():
    with pytest.raises(DeviceError, match="2:4 products need a GPU, and the model is on cpu"):
        wanda_fast.accelerate(model())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu():
    built = nn.Sequential(nn.Linear(4096, 4096, bias=False)).to("cuda", torch.float16).requires_grad_(False)
    built[0].weight.view(-1, 4)[:, ::2] = 0
    x = torch.randn(512, 4096, device="cuda", dtype=torch.float16)
    before = built(x)
    found = wanda_fast.accelerate(built)
    assert found["0"].sparse_ms and found["0"].dense_ms
    torch.testing.assert_close(built(x), before, rtol=0, atol=0.02)
