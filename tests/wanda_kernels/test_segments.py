"""Statistics of many experts in one call: each expert's sums against an fp64 sum over its own tokens."""

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import DTYPES, random_weight
from tests.wanda_kernels.conftest import device_of
from tests.wanda_kernels.native_cases import ISAS, needs_cpu
from wanda_kernels.dispatch import backends
from wanda_kernels.native import ops as native

N_OUT, N_IN, N_TOKENS = 37, 70, 75
# the shapes of an operation's sums for one expert; the last of co-activations is the optional sq_norm
SUMS = {
    "add_sq_norm_": ((N_IN,),),
    "add_hessian_": ((N_IN, N_IN),),
    "add_coactivation_": ((N_OUT, N_IN), (N_IN,)),
    "add_gated_coactivation_": ((N_OUT, N_IN), (N_OUT, N_IN), (N_IN,)),
}
CASES = [
    (operation, backend)
    for operation in SUMS
    for backend in backends.BACKENDS
    if not backends.why_not(operation, device_of(backend), backend)
]
OFFSETS = {
    "some without tokens": (0, 0, 5, 5, 38, 39, N_TOKENS),
    "one with all tokens": (0, 0, N_TOKENS, N_TOKENS),
    "one expert": (0, N_TOKENS),
    "rows before the first and behind the last": (7, 8, 8, 66),
    "no expert with tokens": (0, 0, 0),
    "no expert": (0,),
}
# relative to the largest sum of an expert. fp32: sums in another order, and an approximate exp. 16 bits: both
# operands of a product rounded to bf16, and the interpreter's casts truncate
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-6, torch.bfloat16: 2**-6}


def tokens(dtype: torch.dtype, n_tokens: int = N_TOKENS) -> dict[str, torch.Tensor]:
    widths = {"gate": N_OUT, "up": N_OUT, "x": N_IN}
    return {
        name: random_weight(n_tokens, width, dtype, seed) * 20
        for seed, (name, width) in enumerate(widths.items())
    }


def stacks(operation: str, n_experts: int, device: str = "cpu") -> list[torch.Tensor]:
    """Sums to add to: experts lie in a wider tensor, so that memory between them must not change."""
    found = []
    for shape in SUMS[operation]:
        wide = torch.rand(n_experts, shape[0] + 3, *shape[1:], device=device)
        if len(shape) == 2 and shape[0] == shape[1]:
            wide[:, :N_IN] += wide[:, :N_IN].mT.clone()
        found.append(wide[:, : shape[0]])
    return found


def add(operation: str, sums, given: dict[str, torch.Tensor], offsets=None, backend: str = "auto") -> None:
    run = getattr(wanda_kernels, operation)
    extra = {"sq_norm": sums[-1]} if len(sums) > 1 else {}
    names = {"add_coactivation_": ("gate", "x"), "add_gated_coactivation_": ("gate", "up", "x")}
    operands = [given[name] for name in names.get(operation, ("x",))]
    run(*sums[: len(sums) - len(extra)], *operands, **extra, offsets=offsets, backend=backend)


def exact(operation: str, gate, up, x) -> list[torch.Tensor]:
    """One expert's sums over its tokens, in fp64."""
    gate, up, x = (each.double() for each in (gate, up, x))
    sq_norm, sigmoid = x.square().sum(0), 1 / (1 + (-gate).exp())
    value, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    return {
        "add_sq_norm_": [sq_norm],
        "add_hessian_": [x.T @ x],
        "add_coactivation_": [value.abs().T @ x.abs(), sq_norm],
        "add_gated_coactivation_": [
            (up * slope).square().T @ x.square(),
            value.square().T @ x.square(),
            sq_norm,
        ],
    }[operation]


def assert_sums(operation, before, got, given, offsets, dtype) -> None:
    for expert, (first, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        mine = exact(operation, *(each[first:end] for each in given.values()))
        for start, after, added in zip(before, got, mine, strict=True):
            start, after = start[expert].cpu(), after[expert].cpu()
            if first == end:
                assert torch.equal(start, after), "an expert without tokens keeps its bits"
            expected = start.double() + added
            tolerance = TOLERANCE[torch.float32 if operation == "add_hessian_" else dtype]
            atol = tolerance * expected.abs().max().item()
            torch.testing.assert_close(after.double(), expected, rtol=0, atol=atol)
            if operation == "add_hessian_":
                assert torch.equal(after, after.T)


@pytest.mark.parametrize("layout", OFFSETS)
@pytest.mark.parametrize("operation, backend", CASES)
def test_each_experts_sums(operation, backend, device, layout):
    offsets, dtype = OFFSETS[layout], torch.float32
    check(operation, backend, device, offsets, dtype, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("operation, backend", CASES)
def test_sixteen_bits(operation, backend, device, dtype):
    check(operation, backend, device, OFFSETS["some without tokens"], dtype, torch.int32)


def check(operation, backend, device, offsets, dtype, offset_dtype) -> None:
    given = tokens(dtype)
    for each in given.values():  # rows of no expert
        each[: offsets[0]] = each[offsets[-1] :] = torch.nan
    sums = stacks(operation, len(offsets) - 1, device)
    around = [each._base.clone() for each in sums]
    before = [each.clone() for each in sums]
    moved = {name: each.to(device) for name, each in given.items()}
    add(operation, sums, moved, torch.tensor(offsets, dtype=offset_dtype, device=device), backend)
    assert_sums(operation, before, sums, given, offsets, dtype)
    for each, outside in zip(sums, around, strict=True):
        assert torch.equal(each._base[:, each.shape[1] :], outside[:, each.shape[1] :])


@pytest.mark.parametrize("operation, backend", CASES)
def test_no_tokens_at_all(operation, backend, device):
    sums = stacks(operation, 2, device)
    before = [each.clone() for each in sums]
    given = {name: each.to(device) for name, each in tokens(torch.bfloat16, 0).items()}
    add(operation, sums, given, torch.zeros(3, dtype=torch.int32, device=device), backend)
    assert all(map(torch.equal, sums, before))


@pytest.mark.parametrize("operation, backend", CASES)
def test_an_infinity_stays_with_its_expert(operation, backend, device):
    given = tokens(torch.bfloat16)
    given["x"][20, 66] = torch.inf
    sums = [torch.zeros_like(each) for each in stacks(operation, 3, device)]
    moved = {name: each.to(device) for name, each in given.items()}
    add(operation, sums, moved, torch.tensor([0, 20, 21, N_TOKENS], device=device), backend)
    for each in sums:
        assert each[[0, 2]].isfinite().all()
        assert each[1, ..., 66].isinf().all()
        assert each[1][(slice(60),) * (each.dim() - 1)].isfinite().all()


@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", SUMS)
def test_the_bits_of_a_call_for_each_expert(operation, dtype, isa, monkeypatch):
    """Experts with none, few, and more tokens than a block of the CPU backend; on any number of threads."""
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", isa)
    offsets = (0, 1, 1, 4, 263, 1700, 1702)
    given = tokens(dtype, offsets[-1])
    before = stacks(operation, len(offsets) - 1)
    expected = [each.clone() for each in before]
    for expert, (first, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        own = {name: each[first:end] for name, each in given.items()}
        add(operation, [each[expert] for each in expected], own, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 7):
            torch.set_num_threads(n_threads)
            got = [each.clone() for each in before]
            add(operation, got, given, torch.tensor(offsets), "cpu")
            for mine, right in zip(got, expected, strict=True):
                if mine.dim() == 2 or "fp32" in native.squares() and operation == "add_hessian_":
                    assert torch.equal(mine, right)
                torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6 * right.abs().max().item())
    finally:
        torch.set_num_threads(threads)


def test_a_stack_of_halves():
    """The sums of gate and up are halves of one tensor, as in a fused projection."""
    given, offsets = tokens(torch.float32), OFFSETS["some without tokens"]
    both = torch.zeros(len(offsets) - 1, 2 * N_OUT, N_IN)
    sums = [*both.chunk(2, dim=1), torch.zeros(len(offsets) - 1, N_IN)]
    before = [each.clone() for each in sums]
    add("add_gated_coactivation_", sums, given, torch.tensor(offsets))
    assert_sums("add_gated_coactivation_", before, sums, given, offsets, torch.float32)


def test_compiled_without_a_graph_break():
    def run(acc, x, offsets):
        wanda_kernels.add_hessian_(acc, x, offsets)
        return acc.sum()

    x, offsets = tokens(torch.float32)["x"], torch.tensor([0, 5, 5, N_TOKENS])
    expected, acc = torch.zeros(2, 3, N_IN, N_IN)
    total = run(expected, x, offsets)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(acc, x, offsets), total) and torch.equal(acc, expected)
