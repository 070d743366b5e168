"""Calibration forwards in 8 bits: the rounding, the products, and where in a run they are."""

from functools import partial

import pytest
import torch
from torch import nn

import wanda_fast
from tests.published import prune_published
from tests.tiny_models import FAMILIES, build, token_ids
from wanda_fast import errors
from wanda_fast.model import rounded_products
from wanda_fast.model.rounded_products import FORMATS, _in_fp32, _on_gpu, require_multiplies, rounded

# Every number of the format: of fp8, those of the bytes that are no NaN.
FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = {"fp8": FP8[FP8.isfinite()], "int8": torch.arange(-127, 128).double()}


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_the_nearest_of_the_format(name, dtype):
    matrix = torch.randn(16, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix[3], matrix[4, 1:], matrix[5] = 0, 0, 2.0**-24
    values, scale = rounded(matrix, name)
    assert values.dtype == FORMATS[name][0] and scale.shape == (16, 1) and scale.dtype == torch.float32
    assert (scale[3] == 1) and (values[3].float() == 0).all()
    assert (values.float().abs().amax(dim=1)[[0, 4, 5]] == FORMATS[name][1]).all()
    distance = (matrix.double() / scale - NUMBERS[name][:, None, None]).abs()
    found = (matrix.double() / scale - values.double()).abs()
    assert (found <= distance.amin(dim=0) * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize(("name", "bound"), [("fp8", 2**-8), ("int8", 1e-6)])
def test_the_product_of_gpus_is_the_one_in_fp32(name, bound):
    """torch has both products on CPUs, too."""
    x, weight = torch.randn(48, 64), torch.randn(80, 64)
    operands = *rounded(x, name), *rounded(weight, name)
    expected, found = _in_fp32(*operands), _on_gpu(*operands).float()
    assert ((found - expected).abs() <= bound * expected.abs().clamp_min(1e-3)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("name", "bound"), [("fp8", 2**-7), ("int8", 1e-5)])
def test_on_a_gpu(name, bound):
    x, weight = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((256, 512), (384, 512))
    )
    operands = *rounded(x, name), *rounded(weight, name)
    expected, found = _in_fp32(*operands), _on_gpu(*operands).float()
    assert ((found - expected).abs() <= bound * expected.abs().max()).all()


def by_hand(module, largest, x):
    """fp8, or int8, written out."""
    values = []
    for matrix in (x.reshape(-1, x.shape[-1]), module.weight):
        scale = matrix.abs().max(dim=1).values[:, None] / largest
        each = matrix / scale
        each = each.round() if largest == 127 else each.to(torch.float8_e4m3fn).float()
        values.append(each * scale)
    return (values[0] @ values[1].t() + (0 if module.bias is None else module.bias)).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_masks_are_those_of_the_published_loop_with_such_products(name, family):
    model, reference, plain = FAMILIES[family](), FAMILIES[family](), FAMILIES[family]()
    for block in reference.model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.forward = partial(by_hand, module, FORMATS[name][1])
    ids, dense = token_ids(model, 4, 32), {n: p.clone() for n, p in model.named_parameters()}
    expected = prune_published(reference, ids, "wanda", "0.5")
    options = dict(dataset=ids, eval_dataset=ids, seqlen=32)
    report = wanda_fast.prune(model, forward_dtype=name, **options)
    other = wanda_fast.prune(plain, **options)
    assert report.perplexity["dense"] == other.perplexity["dense"]
    apart = differs = 0
    for linear, mask in expected.items():
        weight = model.get_submodule(linear).weight
        apart += int((weight.eq(0) != mask).sum())
        assert torch.equal(weight, dense[f"{linear}.weight"].where(weight != 0, 0.0))
        differs += int((plain.get_submodule(linear).weight.ne(0) != weight.ne(0)).sum())
    # The last bit of a forward can decide to which of two numbers of 8 bits a value is rounded.
    assert apart < differs / 50
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "options", [{"sequential": "linear"}, {"statistics": "dense"}, {"prune_method": "admm"}]
)
def test_streamed_is_in_memory(options, tmp_path):
    model = build("llama2")
    model.save_pretrained(tmp_path / "dense")
    options |= dict(dataset=token_ids(model, 4, 32), forward_dtype="fp8", seqlen=32, eval_dataset=None)
    wanda_fast.prune(str(tmp_path / "dense"), save_model=tmp_path / "out", **options)
    wanda_fast.prune(model, **options)
    saved = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", list(FORMATS))
def test_an_expert_without_tokens(name):
    linear = nn.Linear(8, 6)
    assert rounded_products._linear(linear, name, torch.zeros(0, 8)).shape == (0, 6)


def test_nan_stays():
    values, scale = rounded(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), "int8")
    product = _in_fp32(values, scale, *rounded(torch.ones(3, 2), "int8"))
    assert product[0].isnan().all() and product[1].isfinite().all()


def test_what_is_not_rounded_is_said():
    for family, method, words in (
        ("gpt2", "wanda", "8 of 8 weights, such as transformer.h.0.attn.c_attn, are no nn.Linear"),
        ("llama2", "magnitude", "forward_dtype int8 has no effect: the method runs no calibration"),
    ):
        model = FAMILIES[family]()
        options = dict(dataset=token_ids(model, 2, 16), prune_method=method)
        (said,) = wanda_fast.prune(model, forward_dtype="int8", **options).warnings
        assert words in said


def test_a_gpu_without_such_products(monkeypatch):
    monkeypatch.setattr(rounded_products.torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = torch.device("cuda:1")
    with pytest.raises(
        errors.DeviceError, match="forward_dtype fp8 needs .* 8.9 or later, and cuda:1 has 8.0"
    ):
        require_multiplies("fp8", gpu)
    for name, device in (("int8", gpu), (None, gpu), ("fp8", torch.device("cpu"))):
        require_multiplies(name, device)
