"""On a GPU: a streamed checkpoint and a live model give the same bytes, wherever activations lie."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import wanda_fast
from tests.every_architecture import tiny_config
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from tests.wanda_fast.model.test_fused_modules import names_of_calls
from wanda_fast.model.fused_modules import fused_modules
from wanda_fast.model.offload import Offload, on_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(FAMILIES["llama2"]().bfloat16(), folder, pydoc_text[:20000])
    return folder


def prune(model, out, **options):
    """The report, and the tensors of what was written."""
    settings = dict(dataset=token_ids(FAMILIES["llama2"](), 6, 128), batch_size=2, seqlen=128, device="cuda")
    settings |= dict(eval_dataset=token_ids(FAMILIES["llama2"](), 3, 128), save_model=out)
    report = wanda_fast.prune(model, **settings | options)
    return report, load_file(out / "model.safetensors")


def assert_equal_bytes(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("method", ["wanda", "connect", "magnitude"])
def test_streamed_equals_live(method, llama, tmp_path):
    live = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)  # its frequencies stay fp32
    _, expected = prune(live, tmp_path / "live", prune_method=method)
    report, streamed = prune(str(llama), tmp_path / "streamed", prune_method=method)
    assert_equal_bytes(streamed, expected)
    assert 0 < report.peak_memory["cuda:0"]


@pytest.mark.parametrize("method", ["wanda", "gated", "sparsegpt"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_pruned_as_on_a_cpu(name, method):
    """gpt_oss: stored transposed, gate and up alternate, with biases."""
    pruned = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).eval()
        ids = token_ids(model, 8, 64)
        settings = dict(prune_method=method, sparsity_type="2:4", dataset=ids, seqlen=64, batch_size=2)
        report = wanda_fast.prune(model.to(device), device=device, **settings)
        pruned.append({key: (p == 0).cpu() for key, p in model.named_parameters()})
        assert report.sparsity == 0.5
    experts = [key for key in pruned[0] if ".experts." in key and "bias" not in key]
    assert experts
    for key in experts:
        assert (pruned[0][key] == pruned[1][key]).float().mean() > 0.97, key


@pytest.mark.parametrize("sequential", ["block", "linear"])
def test_every_placement_gives_the_same(sequential, llama, tmp_path):
    results = {
        kind: prune(str(llama), tmp_path / kind, activations=kind, sequential=sequential)
        for kind in ("device", "host", "disk")
    }
    expected, tensors = results.pop("device")
    for report, other in results.values():
        assert report.perplexity == expected.perplexity
        assert_equal_bytes(other, tensors)


def test_hessians_on_the_host_serve_as_those_on_the_device(llama, tmp_path):
    options = dict(prune_method="sparsegpt", sparsity_type="2:4")
    _, there = prune(str(llama), tmp_path / "device", hessian_device="device", **options)
    report, here = prune(str(llama), tmp_path / "host", hessian_device="host", **options)
    same = [
        ((here[name] == 0) == (there[name] == 0)).float().mean()
        for name in here
        if name[: -len(".weight")] in report.linears
    ]
    assert min(same) > 0.99
    assert {linear.further["add_hessian_"] for linear in report.linears.values()} == {"torch"}


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_no_copy_overtakes_what_it_waits_for(kind, tmp_path):
    """Long kernels before each result, large batches, three passes: a copy too early or memory reused too
    early would show."""
    offload = Offload(kind, torch.device("cuda", 0), tmp_path)
    expected = torch.randint(-4, 5, (14, 1024, 1024)).bfloat16()
    hidden = offload.empty(expected.shape, expected.dtype)
    batches = [slice(start, start + 2) for start in range(0, 14, 2)]
    for batch in batches:
        hidden[batch] = expected[batch].cuda()
    for _ in range(3):
        for batch in batches:
            seen = hidden[batch]
            torch.cuda._sleep(10_000_000)  # cycles: some milliseconds
            hidden[batch] = seen * 2 + 1
            del seen
            torch.full((2, 1024, 1024), 7.0, dtype=torch.bfloat16, device="cuda")  # takes freed memory
    expected = expected.cuda()
    for _ in range(3):
        expected = expected * 2 + 1
    assert torch.equal(torch.cat(list(on_host(hidden))), expected.cpu())
    offload.close()


def test_host_memory_is_pinned(tmp_path):
    hidden = Offload("host", torch.device("cuda", 0)).empty((2, 8, 4), torch.bfloat16)
    assert hidden._stored.is_pinned() and hidden[0:2].is_cuda


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_fused_forward_gives_the_models_own_results(name, monkeypatch):
    """The kernels are asked, what they put out is the model's, and the sums they leave are the norms'."""
    from wanda_kernels.triton_ops import forward as triton_forward

    model, ids = FAMILIES[name]().cuda(), token_ids(FAMILIES[name](), 2, 40).cuda()
    used = names_of_calls(triton_forward, monkeypatch)
    with torch.no_grad():
        wanted = model(ids).logits
        with fused_modules(model):
            found = model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert set(used) == {"rms_norm", "gated_product", "rotary"}


@pytest.mark.parametrize("sequential", ["block", "linear"])
def test_masks_with_and_without_kernels(sequential, monkeypatch):
    """fp32: kernels for norms, statistics and selection against torch's own, on one GPU."""
    ids, masks = token_ids(FAMILIES["llama3"](), 6, 128), []
    for backend in ("", "torch"):
        monkeypatch.setenv("WANDA_KERNELS_BACKEND", backend)
        model = FAMILIES["llama3"]()
        wanda_fast.prune(model, dataset=ids, batch_size=2, device="cuda", sequential=sequential)
        masks.append(torch.cat([parameter.flatten() == 0 for parameter in model.parameters()]).cpu())
    assert (masks[0] == masks[1]).float().mean() > 0.999
