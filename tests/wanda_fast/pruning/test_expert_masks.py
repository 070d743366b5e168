"""Masks of experts and Conv1D against the published formulas, on a copy of the model that is all nn.Linear.

The copy runs expert by expert, one sequence at a time, and shares no code with the pruner.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import wanda_fast
from benchmarks.jobs.published_pipeline import find_blocks
from benchmarks.jobs.published_selection import update
from tests.published import nearest_tie, select
from tests.tiny_models import VOCAB, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

CLEAR_GAP = 1e-5  # relative, between the last score pruned and the first kept: above fp32's rounding of a sum
SAME_OF_SPARSEGPT = 0.999  # of all weights: its decisions follow from its own updates, which rounding changes

SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0)
MOE = SIZES | dict(num_experts_per_tok=2, intermediate_size=24, moe_intermediate_size=24)
LOCAL, EXPERTS = MOE | dict(num_local_experts=4), MOE | dict(num_experts=4)
SHARED = MOE | dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
LATENT = SHARED | dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
LATENT |= dict(head_dim=8)
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(**LOCAL),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**EXPERTS),
    "olmoe": lambda: hf.OlmoeConfig(**EXPERTS),
    "deepseek_v2": lambda: hf.DeepseekV2Config(**LATENT),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**LATENT),
    "glm4_moe": lambda: hf.Glm4MoeConfig(**SHARED),
    "granitemoe": lambda: hf.GraniteMoeConfig(**LOCAL),
    "gpt_oss": lambda: hf.GptOssConfig(**LOCAL, swiglu_limit=1.5),  # low, so that it does clamp
    "llama4": lambda: hf.Llama4TextConfig(**LOCAL, intermediate_size_mlp=24),
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64,
                                  bos_token_id=0, eos_token_id=1),
}  # fmt: skip
OWN_TOKENS = dict(expert_shrinkage=0.0, expert_tokens="routed", expert_weighting="none")
TRANSPOSED, INTERLEAVED = ("gpt_oss", "llama4"), ("gpt_oss",)


def build(family):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        # Norms and biases begin as ones or zeros: an error there would not show.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


class Expert(nn.Module):
    """down(h(gate(x), up(x)))"""

    def __init__(self, gate, up, down, h):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.h = gate, up, down, h

    def forward(self, x):
        return self.down_proj(self.h(self.gate_proj(x), self.up_proj(x)))


class ExpertByExpert(nn.ModuleList):
    """Remembers its calls in `calls`."""

    def __init__(self, experts):
        super().__init__(experts)
        self.calls = []

    def forward(self, x, top_k_index=None, top_k_weights=None):
        self.calls.append((x, top_k_index, top_k_weights))
        if top_k_index is None:  # Llama-4: all tokens for each expert, multiplied by its router's score
            parts = x.view(len(self), -1, x.shape[-1])
            return torch.cat([expert(part) for expert, part in zip(self, parts, strict=True)])
        out = torch.zeros_like(x)
        for index, expert in enumerate(self):
            tokens, which = torch.where(top_k_index == index)
            out[tokens] += top_k_weights[tokens, which, None] * expert(x[tokens])
        return out


def unfused(family, model):
    """A copy of the model with an nn.Linear for each matrix, under the names that reports give them."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, linear(module.weight.T, module.bias))
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            experts = [expert(family, module, index) for index in range(module.num_experts)]
            model.set_submodule(name, ExpertByExpert(experts))
    return model


def expert(family, module, index):
    both, down = module.gate_up_proj[index], module.down_proj[index]
    if family in TRANSPOSED:
        both, down = both.T, down.T
    of_both, of_down = (getattr(module, f"{name}_proj_bias", None) for name in ("gate_up", "down"))
    weights, biases = split(family, both), (None, None)
    if of_both is not None:
        biases, of_down = split(family, of_both[index]), of_down[index]
    gate, up = (linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return Expert(gate, up, linear(down, of_down), gpt_oss if family == "gpt_oss" else swiglu)


def split(family, both):
    return (both[::2], both[1::2]) if family in INTERLEAVED else both.chunk(2)


def swiglu(gate, up):
    return nn.functional.silu(gate) * up


def gpt_oss(gate, up):
    gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def linear(weight, bias):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    module.bias = bias if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    return module


@torch.no_grad()
def prune_reference(model, ids, method, pattern, **options):
    """Block after block. Returns: masks by the linears' names, the relative gap of the closest decision."""
    blocks, names = find_blocks(model), {module: name for name, module in model.named_modules()}
    hidden, rest = record_calls(model, blocks, ids)
    masks, gap = {}, math.inf
    for block, arguments in zip(blocks, rest, strict=True):
        # Llama-4's router is a subclass.
        linears = [each for each in block.modules() if type(each) is nn.Linear]
        samples = record_inputs(block, linears, hidden, arguments)
        for experts in (each for each in block.modules() if isinstance(each, ExpertByExpert)):
            samples |= samples_of_experts(experts, **options)
        roots = roots_of(block, samples, method)
        for each in linears:
            mask, closest = prune_linear(each.weight, *samples[each], roots[each], method, pattern)
            masks[names[each]], gap = mask, min(gap, closest)
        hidden = [run_block(block, x, *given) for x, given in zip(hidden, arguments, strict=True)]
    return masks, gap


def record_calls(model, blocks, ids):
    """Of each sequence: what comes into block 0, and the other arguments of every block."""
    hidden, rest = [], [[] for _ in blocks]

    def note(block, args, kwargs):
        kwargs = dict(kwargs)
        first, *args = args or (kwargs.pop("hidden_states"),)
        rest[index[block]].append((args, kwargs))
        if index[block] == 0:
            hidden.append(first)

    index = {block: place for place, block in enumerate(blocks)}
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    for sequence in ids:
        model(sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return hidden, rest


def run_block(block, x, args, kwargs):
    out = block(x, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def record_inputs(block, linears, hidden, arguments):
    """Of each linear that the block calls: the tokens [tokens, in] that come to it, and 1 for each."""
    seen = {}

    def note(each, args):
        seen.setdefault(each, []).append(args[0].reshape(-1, each.in_features))

    handles = [each.register_forward_pre_hook(note) for each in linears]
    for experts in (each for each in block.modules() if isinstance(each, ExpertByExpert)):
        experts.calls.clear()
    for x, given in zip(hidden, arguments, strict=True):
        run_block(block, x, *given)
    for handle in handles:
        handle.remove()
    return {each: (torch.cat(parts), torch.ones(sum(map(len, parts)))) for each, parts in seen.items()}


def samples_of_experts(experts, expert_shrinkage=0, expert_tokens="routed", expert_weighting="none"):
    """Of each expert's linears: all tokens [tokens, in], as if all went through it, and what each counts."""
    samples = {}
    for index, expert in enumerate(experts):
        parts, counts = [], []
        for x, top_k_index, weights in experts.calls:
            if top_k_index is None:
                parts.append(x.view(len(experts), -1, x.shape[-1])[index])
                counts.append(torch.ones(len(parts[-1])))
                continue
            routed = (top_k_index == index).float()
            parts.append(x)
            counts.append((routed * weights.square() if expert_weighting == "router" else routed).sum(dim=1))
        x, count = torch.cat(parts), torch.cat(counts)
        if expert_tokens == "all":
            count = torch.ones_like(count)
        # n_e m_e + TAU m, of which (n_e + TAU) is a factor for the whole matrix.
        count = count + expert_shrinkage / len(count)
        samples |= dict.fromkeys((expert.gate_proj, expert.up_proj), (x, count))
        samples[expert.down_proj] = expert.h(expert.gate_proj(x), expert.up_proj(x)), count
    return samples


def roots_of(block, samples, method):
    """What each linear's |W| is multiplied by: [in], or [out, in] of a gated MLP by connect and gated."""
    roots = {each: (count @ x.square()).sqrt() for each, (x, count) in samples.items()}
    for mlp in block.modules() if method in ("connect", "gated") else []:
        if not hasattr(mlp, "gate_proj"):
            continue
        (x, count), h = samples[mlp.up_proj], getattr(mlp, "h", swiglu)
        with torch.enable_grad():
            gate, up = (each(x).requires_grad_() for each in (mlp.gate_proj, mlp.up_proj))
            of_gate, of_up = torch.autograd.grad(h(gate, up).sum(), (gate, up))
        if method == "connect":
            roots[mlp.up_proj] = (of_up.abs().T * count @ x.abs()).sqrt()
        else:
            roots[mlp.up_proj] = (of_up.square().T * count @ x.square()).sqrt()
            roots[mlp.gate_proj] = (of_gate.square().T * count @ x.square()).sqrt()
    return roots


def prune_linear(weight, x, count, root, method, pattern):
    """In place; a linear without tokens by magnitude. Returns: mask, relative gap of the closest decision."""
    if method == "magnitude" or not (count @ x.abs()).any():
        mask, gap = select(weight.abs(), pattern, "magnitude"), math.inf
    elif method == "sparsegpt":
        return update(weight, 2 * (x.T * count) @ x / len(x), root, pattern), math.inf
    else:
        mask = select(weight.abs() * root, pattern, method)
        gap = nearest_tie(weight.abs() * root, mask, pattern)
    weight[mask] = 0
    return mask, gap


def prune_both(family, method, pattern, change=lambda model: None, expert_options=OWN_TOKENS, **options):
    """On the first tokens for which no decision hangs on rounding.

    Returns: the pruned copy, its masks, the pruned model in the copy's form, the report.
    """
    for seed in range(30):
        dense = build(family)
        change(dense)
        expected, ids = unfused(family, dense), token_ids(dense, 4, 24, seed)
        masks, gap = prune_reference(expected, ids, method, pattern, **expert_options)
        if gap > CLEAR_GAP:
            break
    else:
        raise AssertionError(f"{family} {method} {pattern}: a near tie for every seed")
    ratio = None if ":" in pattern else float(pattern)
    chosen = dict(sparsity_type=pattern if ratio is None else "unstructured", sparsity_ratio=ratio)
    options |= dict(prune_method=method, dataset=ids, batch_size=2, dtype="float32")
    report = wanda_fast.prune(dense, **chosen, **expert_options, **options)
    return expected, masks, unfused(family, dense), report


def differing(model, masks):
    """Names of linears whose zeros are not exactly the mask, with how many weights differ."""
    zeros = {name: model.get_submodule(name).weight == 0 for name in masks}
    counts = {name: (zeros[name] != mask).sum().item() for name, mask in masks.items()}
    return {name: count for name, count in counts.items() if count}


# Each way to store experts with each pattern; the other families differ in their blocks and routers.
EVERY_PATTERN = ("mixtral", "gpt_oss", "llama4", "gpt2")
METHODS = {"magnitude": "0.5", "wanda": "2:4", "connect": "0.5", "gated": "2:4", "sparsegpt": "2:4"}
CASES = [
    (family, method, pattern)
    for family in CONFIGS
    for method in METHODS
    for pattern in (("2:4", "0.5") if family in EVERY_PATTERN else (METHODS[method],))
]


@pytest.mark.parametrize(("family", "method", "pattern"), [case for case in CASES if case[1] != "sparsegpt"])
def test_masks_equal(family, method, pattern):
    expected, masks, model, report = prune_both(family, method, pattern)
    assert report.linears.keys() == masks.keys()
    assert differing(model, masks) == {}
    # Weights that stay, routers, biases, norms.
    parameters = dict(model.named_parameters())
    assert [name for name, p in expected.named_parameters() if not torch.equal(p, parameters[name])] == []


@pytest.mark.parametrize(
    ("family", "pattern"), [(family, pattern) for family, method, pattern in CASES if method == "sparsegpt"]
)
def test_sparsegpt(family, pattern):
    expected, masks, model, report = prune_both(family, "sparsegpt", pattern)
    assert report.linears.keys() == masks.keys()
    total = sum(mask.numel() for mask in masks.values())
    assert sum(differing(model, masks).values()) <= (1 - SAME_OF_SPARSEGPT) * total


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("method", ["wanda", "connect", "gated", "sparsegpt"])
def test_expert_without_tokens(method, pattern):
    """Block 1's router sends no token to expert 2: magnitude prunes it, and the report says so."""

    def starve(model):
        model.model.layers[1].mlp.router.bias[2] = -1e4

    _, masks, model, report = prune_both("gpt_oss", method, pattern, starve)
    starved = [f"model.layers.1.mlp.experts.2.{name}_proj" for name in ("gate", "up", "down")]
    fallen = {name: each.fallback for name, each in report.linears.items() if each.fallback}
    assert fallen == dict.fromkeys(starved, "magnitude")
    assert not differing(model, masks).keys() & starved
    assert method == "sparsegpt" or differing(model, masks) == {}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
def test_mask_file(family, tmp_path):
    _, masks, _, _ = prune_both(family, "gated", "2:4", save_mask=tmp_path / "masks.safetensors")
    packed = load_file(tmp_path / "masks.safetensors")
    assert packed.keys() == {f"{name}.weight" for name in masks}
    for name, mask in masks.items():
        kept = np.unpackbits(packed[f"{name}.weight"].numpy(), axis=1, bitorder="little", count=mask.shape[1])
        assert np.array_equal(kept == 0, mask.numpy()), name


@pytest.mark.parametrize(
    "option", [("shrinkage", 64.0), ("tokens", "all"), ("weighting", "router")], ids=lambda option: option[0]
)
@pytest.mark.parametrize("method", ["wanda", "gated", "sparsegpt"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_options_of_experts(family, method, option):
    name, value = option
    chosen = OWN_TOKENS | {f"expert_{name}": value}
    _, masks, model, _ = prune_both(family, method, "2:4", expert_options=chosen)
    allowed = 1 - SAME_OF_SPARSEGPT if method == "sparsegpt" else 0
    differ = differing(model, masks)
    assert sum(differ.values()) <= allowed * sum(mask.numel() for mask in masks.values())
    # The option decides some masks.
    others = masks_of_own_tokens(family, method)
    assert any(not torch.equal(mask, masks[name]) for name, mask in others.items())


@functools.cache
def masks_of_own_tokens(family, method):
    return prune_both(family, method, "2:4")[1]
