"""Experts in three-dimensional parameters: found by structure, and run by segments of sorted tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import wanda_fast
from tests.every_architecture import tiny_config
from wanda_fast.model.architecture import find_blocks
from wanda_fast.model.experts import ExpertLinear, sorted_by_expert
from wanda_fast.model.find_experts import find_experts

# gpt_oss: transposed, gate and up alternate, biases, a gate of its own; llama4_text: transposed, every token
# through every expert; longcat_flash: experts that return their input; nemotron_h: no gate.
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe", "olmoe")
FAMILIES += ("gpt_oss", "llama4_text", "longcat_flash", "nemotron_h", "aria_text", "jetmoe")


def model_of(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def blocks_with_experts(model):
    return [block for block in find_blocks(model) if block.experts]


@pytest.mark.parametrize("name", FAMILIES)
def test_sorted_forward_is_the_modules_own(name):
    model = model_of(name)
    model.set_experts_implementation("eager") if hasattr(model, "set_experts_implementation") else None
    ids = torch.randint(3, 320, (3, 24), generator=torch.Generator().manual_seed(0))
    own = model(ids, use_cache=False).logits
    experts = [each for block in blocks_with_experts(model) for each in block.experts]
    assert experts
    calls = []
    for each in experts:
        each.first.register_forward_pre_hook(lambda _module, args: calls.append(args[1]))
    with sorted_by_expert(experts):
        ours = model(ids, use_cache=False).logits
    assert len(calls) == len(experts)
    torch.testing.assert_close(ours, own, rtol=2e-4, atol=2e-4)
    assert torch.equal(model(ids, use_cache=False).logits, own)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_is_named_and_a_view(name):
    model = model_of(name)
    for block in blocks_with_experts(model):
        linears = [linear for linear in block.linears if isinstance(linear, ExpertLinear)]
        stacks = {name for name, p in model.named_parameters() if p.dim() == 3 and "conv" not in name}
        held = {name: 0 for name in stacks if name.startswith(f"{block.name}.")}
        for linear in linears:
            experts, _, index = linear.name.rpartition(".")[0].rpartition(".")
            assert experts == linear.experts.name and int(index) == linear.index
            held[linear.parameter] += linear.weight.numel()
            before = model.get_parameter(linear.parameter).clone()
            linear.weight.data.add_(1.0)
            changed = model.get_parameter(linear.parameter) != before
            assert changed.sum() == linear.weight.numel() and changed[linear.index].any()
        assert all(0 < held[name] <= model.get_parameter(name).numel() for name in held)


def test_matrices_multiply_as_the_projections_do():
    model = model_of("gpt_oss")
    experts = find_experts(model)[0]
    for parameter in experts.module.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, experts.first.stack.shape[2], generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 0, 7, 7, 7])
    gate, up = experts.first.split(experts.first(x, offsets, None))
    bias = experts.module.gate_up_proj_bias[1]
    own = {linear.name.rpartition(".")[2]: linear for linear in experts.linears if linear.index == 1}
    torch.testing.assert_close(gate, x @ own["gate_proj"].weight.t() + bias[::2])
    torch.testing.assert_close(up, x @ own["up_proj"].weight.t() + bias[1::2])
    assert torch.equal(experts.first.joined(gate, up), experts.first(x, offsets, None))


def test_tokens_of_no_expert_add_nothing():
    model = model_of("mixtral")
    experts = find_experts(model)[0]
    x = torch.randn(3, experts.first.stack.shape[2])
    index, weights = torch.tensor([[0, 4], [4, 4], [3, 1]]), torch.rand(3, 2)
    with sorted_by_expert([experts]):
        output = experts.module(x, index, weights)
        alone = experts.module(x[:1], index[:1, :1], weights[:1, :1])
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    torch.testing.assert_close(output[:1], alone)


def test_tokens_of_llama_4_are_those_that_the_router_sent():
    """Every token goes through every expert, as zeros where it was not sent."""
    model = model_of("llama4_text")
    ids = torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(0))
    report = wanda_fast.prune(model, dataset=ids, seqlen=24, expert_shrinkage=4, expert_tokens="all")
    chosen = model.config.num_experts_per_tok
    for block in blocks_with_experts(model):
        counts = [
            report.linears[x.name].tokens
            for x in block.linears
            if x.name.endswith("down_proj") and ".experts." in x.name
        ]
        assert sum(counts) == ids.numel() * chosen, counts
