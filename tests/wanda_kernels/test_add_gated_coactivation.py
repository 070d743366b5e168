import math

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import DTYPES, random_weight

OPERATION = "add_gated_coactivation_"
# fp32: sums of positive terms in another order, and an approximate exp. 16 bits: squares rounded to bf16 on
# both sides of a product, off by 2^-8 each; the interpreter's casts truncate, which doubles that.
RTOL = {torch.float32: 2e-5, torch.float16: 2**-6, torch.bfloat16: 2**-6}


def sigmoid(g):
    return 1 / (1 + (-g).exp())


def gelu_tanh(g):
    """(value, slope) of 0.5 g (1 + tanh v), v = sqrt(2 / pi) (g + 0.044715 g^3)."""
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    rises = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * g**2)
    return 0.5 * g * (1 + inner.tanh()), 0.5 * (1 + inner.tanh()) + 0.5 * g * rises / inner.cosh() ** 2


def gelu(g):
    below = 0.5 * torch.erfc(-g / math.sqrt(2))
    return g * below, below + g * (-g * g / 2).exp() / math.sqrt(2 * math.pi)


ACTIVATIONS = {  # g -> (value, slope)
    None: lambda g: (g, torch.ones_like(g)),
    "silu": lambda g: (g * sigmoid(g), sigmoid(g) * (1 + g * (1 - sigmoid(g)))),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda g: (g.clamp(min=0), (g > 0).double()),
}


def exact(gate, up, x, activation="silu"):
    """(sum for the gate projection, for the up projection) in fp64."""
    gate, up, x = (each.double().flatten(0, -2) for each in (gate, up, x))
    value, slope = ACTIVATIONS[activation](gate)
    return (up * slope).square().T @ x.square(), value.square().T @ x.square()


def operands(n_tokens, n_out, n_in, dtype):
    shapes = ((n_tokens, n_out), (n_tokens, n_out), (n_tokens, n_in))
    return [random_weight(*shape, dtype, seed=seed) * 40 for seed, shape in enumerate(shapes)]


def add(backend, device, accs, tensors, *rest, **named):
    moved = [each.to(device) for each in tensors]
    wanda_kernels.add_gated_coactivation_(*accs, *moved, *rest, backend=backend, **named)


def assert_sums(accs, expected, dtype):
    for acc, sums in zip(accs, expected, strict=True):
        torch.testing.assert_close(acc.cpu().double(), sums, rtol=RTOL[dtype], atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_both_sums_of_products(backend, device, dtype, activation):
    tensors = operands(37, 70, 129, dtype)
    before = torch.rand(2, 70, 129)
    expected = [acc + sums for acc, sums in zip(before, exact(*tensors, activation), strict=True)]
    norm = torch.rand(129)
    expected_norm = norm + tensors[2].float().square().sum(0)
    accs, norm = before.to(device), norm.to(device)
    add(backend, device, accs, tensors, activation, sq_norm=norm)
    assert_sums(accs, expected, dtype)
    torch.testing.assert_close(norm.cpu(), expected_norm, rtol=2e-6, atol=0)


def test_odd_shapes_and_untouched_surroundings(backend, device):
    for n_tokens, n_out, n_in in ((1, 1, 1), (33, 64, 65), (5, 129, 3)):
        tensors = operands(n_tokens, n_out, n_in, torch.bfloat16)
        around = torch.full((2 * n_out * n_in + 8,), -7.0, device=device)
        accs = around[4:-4].view(2, n_out, n_in).zero_()
        add(backend, device, accs, tensors)
        assert_sums(accs, exact(*tensors), torch.bfloat16)
        assert (around[:4] == -7).all() and (around[-4:] == -7).all()


def test_halves_of_a_fused_projection(backend, device):
    """gate and up are halves of one 3D tensor, x is a slice, and the sums are halves of one matrix."""
    both, x = random_weight(24, 80, torch.float16).view(2, 12, 80) * 40, operands(24, 1, 60, torch.float16)[2]
    gate, up = both[:, 1:9].chunk(2, dim=-1)
    x = x.view(2, 12, 60)[:, 1:9, 8:30]
    acc = torch.zeros(80, 22, device=device)
    add(backend, device, acc.chunk(2), (gate, up, x))
    assert_sums(acc.chunk(2), exact(gate, up, x), torch.float16)


def test_operands_that_the_caller_has_activated(backend, device):
    gate, up, x = operands(20, 12, 30, torch.float32)
    value, slope = ACTIVATIONS["silu"](gate.double())
    accs = torch.zeros(2, 12, 30, device=device)
    add(backend, device, accs, (value.float(), (up * slope).float(), x), None)
    assert_sums(accs, exact(gate, up, x, "silu"), torch.float32)


def test_squares_beyond_fp16(backend, device):
    tensors = [torch.full((3, 4), 6e4, dtype=torch.float16)] * 3
    accs = torch.zeros(2, 4, 4, device=device)
    add(backend, device, accs, tensors)
    assert accs.isfinite().all()
    assert_sums(accs, exact(*tensors), torch.float16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero(backend, device, activation):
    """The slope is 1 far above zero and 0 far below it."""
    gate = torch.tensor([[-1e15, -1e4, -88.0, 88.0, 1e4, 1e15]])
    accs = torch.zeros(2, 6, 1, device=device)
    add(backend, device, accs, (gate, torch.ones(1, 6), torch.ones(1, 1)), activation)
    slopes = torch.ones(6) if activation is None else torch.tensor([0.0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(accs[0, :, 0].cpu(), slopes, rtol=1e-6, atol=1e-12)


def test_zeros(backend, device):
    """Sums are zero where up is zero, for a dead input, and for a ReLU at or below zero."""
    gate, up, x = operands(9, 6, 8, torch.float32)
    up[:, 2], x[:, 5], gate[:, 3], gate[:, 4] = 0, 0, 0, -gate[:, 4].abs()
    accs = torch.zeros(2, 6, 8, device=device)
    add(backend, device, accs, (gate, up, x), "relu")
    assert_sums(accs, exact(gate, up, x, "relu"), torch.float32)
    of_gate, of_up = accs.cpu()
    assert not of_gate[2:5].any() and not of_up[3:5].any() and not accs[:, :, 5].any()
    assert of_gate[0, 0] > 0 and of_up[2, 0] > 0


def test_infinity_and_nan_come_through(backend, device):
    gate, up, x = operands(9, 6, 8, torch.bfloat16)
    up[3, 1], gate[2, 4] = float("inf"), float("nan")
    accs = torch.zeros(2, 6, 8, device=device)
    add(backend, device, accs, (gate, up, x))
    of_gate, of_up = accs.cpu()
    assert not of_gate[1].isfinite().any() and of_up[1].isfinite().all()
    assert of_gate[4].isnan().all() and of_up[4].isnan().all()
    assert of_gate[[0, 2, 3, 5]].isfinite().all()


def test_every_run_gives_the_same_bits_and_split_tokens_add_up(backend, device):
    tensors = operands(150, 20, 30, torch.float32)
    sums = [torch.zeros(2, 20, 30, device=device) for _ in range(3)]
    for whole in sums[:2]:
        add(backend, device, whole, tensors)
    assert torch.equal(*sums[:2])
    for cut in (slice(0, 17), slice(17, 17), slice(17, 150)):
        add(backend, device, sums[2], [each[cut] for each in tensors])
    torch.testing.assert_close(sums[2], sums[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(up=torch.ones(5, 4)), r"gate and up must match, got torch.float32 \[5, 3\] and .* \[5, 4\]"),
        (dict(up=torch.ones(5, 3).half()), "gate and up must match, got torch.float32 .* torch.float16"),
        (dict(x=torch.ones(4, 16)), r"gate and x must have the same tokens and dtype, got .* \[4, 16\]"),
        (dict(acc_up=torch.ones(4, 16)), r"acc_up must be contiguous float32 \[3, 16\], got .* \[4, 16\]"),
        (dict(acc_gate=torch.ones(3, 32)[:, ::2]), r"acc_gate must be contiguous float32 \[3, 16\]"),
        (dict(sq_norm=torch.ones(3)), r"sq_norm must be contiguous float32 \[16\]"),
        (dict(activation="mish"), "unknown activation 'mish': choose None, silu"),
    ],
)
def test_refuses_wrong_operands(change, sentence):
    arguments = dict(acc_gate=torch.zeros(3, 16), acc_up=torch.zeros(3, 16), x=torch.ones(5, 16))
    arguments |= dict(gate=torch.ones(5, 3), up=torch.ones(5, 3)) | change
    with pytest.raises(ValueError, match=sentence):
        wanda_kernels.add_gated_coactivation_(**arguments)
    assert not arguments["acc_gate"][:, 0].any() or "acc_gate" in change
