"""Every causal LM that transformers knows, tiny: is it pruned as the model that it is?

    python -m tests.every_architecture [NAME ...]        all: five minutes on one core

A checkpoint of random weights in bfloat16 is pruned in memory, where transformers' own forward measures the
perplexities, and streamed, where they are what came out of the blocks one by one: the same files and the same
perplexities, or it is wrong. A line each: ok (with the share of the blocks' matrix weights that was pruned),
refused (with what is said), not built (these sizes do not fit it), wrong. Exits 1 where one is wrong.
"""

import logging
import math
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

import wanda_fast
from wanda_fast import errors
from wanda_fast.run import in_memory, inputs

LARGEST = 20e6  # parameters: sizes that the table below does not know make a model of real size
CLOSE = 1e-4  # of a perplexity in bfloat16, a mean over 72 tokens
LEAST_OF_EXPERTS = 0.95  # the share in reach of a model with experts
ROUTER_ROWS = 8  # at most, of these sizes

# By the names that configurations use. Those that one has, and does not compute, are set.
SIZES = (
    dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "attention_hidden_size", "lru_width"], 64)
    | dict.fromkeys(["embedding_size", "word_embed_proj_dim"], 64)
    | dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"], 96)
    | dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim"], 96)
    | dict.fromkeys(
        ["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"], 48
    )
    | dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size"], 48)
    | dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers"], 2)
    | dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], 2)
    | dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_experts", "num_local_experts"], 4)
    | dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "n_routed_experts"], 4)
    | dict.fromkeys(["num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads"], 2)
    | dict.fromkeys(["head_dim", "v_head_dim", "qk_head_dim", "q_lora_rank", "kv_lora_rank"], 16)
    | dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"], 16)
    | dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"], 8)
    | dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size"], 8)
    | dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"], 1)
    | dict(zero_expert_num=1)
    | dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 320)
    | dict(linear_num_value_heads=4, max_position_embeddings=256, n_positions=256, initializer_range=0.1)
    | dict(pad_token_id=0, bos_token_id=0, eos_token_id=1)
)
SPARSE_ATTENTION = dict(index_head_dim=16, index_n_heads=4, index_topk=16, num_key_value_heads=4)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_expand=2, mamba_n_groups=1)
OWN = {  # what these need beside
    "axk2": SPARSE_ATTENTION,
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "deepseek_v32": SPARSE_ATTENTION,
    "gemma3n_text": dict(num_kv_shared_layers=0, laurel_rank=8, intermediate_size=96)
    | dict(layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=None),
    "glm_moe_dsa": SPARSE_ATTENTION,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": MAMBA | dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    | dict(mamba_dt_rank=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=8, head_dim=16, expand=2, n_groups=1),
    "nemotron_h": dict(num_hidden_layers=4, layers_block_type=["mamba", "attention", "mlp", "moe"])
    | dict(mamba_num_heads=8, mamba_head_dim=16, n_groups=1),
    "qwen4_exp_text": dict(hc_lowrank=8, ple_embed_dim=16),
    "youtu": dict(pad_token_id=None),  # transformers zeroes its padding's embedding as it loads
    "zaya": dict(num_experts_per_tok=1),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"])
    | dict(mamba_headdim=16, n_mamba_heads=8, mamba_ngroups=1, num_mem_blocks=1)
    | dict(attention_head_dim=32, attention_hidden_size=128),
}
WITHOUT_HEAD_DIM = ("bamba", "falcon", "gemma4_text", "jamba")  # theirs is computed, or differs by layer


class NotBuiltError(Exception):
    """These sizes do not fit the architecture."""


def main(names: list[str]) -> int:
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    codes = []
    for name in names or CAUSAL_LMS:
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(name, Path(folder))
        codes.append(verdict.startswith("wrong"))
        print(f"{name}: {verdict}", flush=True)
    return int(any(codes))


def judge(name: str, folder: Path) -> str:
    """What becomes of the architecture; `folder` is empty."""
    try:
        save_tiny(name, folder / "model")
        return compare(folder)
    except NotBuiltError as error:
        return f"not built: {str(error).splitlines()[0][:100]}"
    except errors.WandaFastError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"


def save_tiny(name: str, folder: Path) -> None:
    """Raises: `NotBuiltError`."""
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size / 1e6:.0f}M parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # most begin as ones, as zeros or near to them
                parameter.add_(0.1 * torch.randn_like(parameter))
            model(tokens()[:1], use_cache=False)
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    model.save_pretrained(folder)


def tiny_config(name: str):
    return _tiny(CONFIG_MAPPING[name], OWN.get(name, {}), with_head_dim=name not in WITHOUT_HEAD_DIM)


def _tiny(kind: type, own: dict, with_head_dim: bool = True):
    default = kind()
    settable = [key for key in SIZES if not isinstance(getattr(kind, key, None), property)]
    sizes = {key: SIZES[key] for key in settable if _is_size(default, key)}
    if not with_head_dim:
        sizes.pop("head_dim", None)
    elif "qk_rope_head_dim" in sizes:
        sizes |= {"head_dim": SIZES["qk_rope_head_dim"]}
    parts = {part: getattr(default, part, None) for part in kind.sub_configs}
    sizes |= {part: _tiny(type(config), {}) for part, config in parts.items() if config is not None}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if kinds and not own:  # a layer of each of two kinds
        try:
            return kind(**sizes, layer_types=(kinds * 2)[:2])
        except Exception:  # computed from something else
            pass
    return kind(**(sizes | own))


def _is_size(config, key: str) -> bool:
    try:
        value = getattr(config, key)
    except Exception:  # there is none, or one for each layer
        return False
    return value is None or isinstance(value, int | float)


def tokens() -> torch.Tensor:
    return torch.randint(3, 320, (3, 24), generator=torch.Generator().manual_seed(0))


def compare(folder: Path) -> str:
    whole, streamed = _prune_both(folder, "bfloat16")
    files = [_tensors(folder / f"{kind}-bfloat16") for kind in ("whole", "streamed")]
    if files[0].keys() != files[1].keys():
        return f"wrong: tensors {sorted(files[0].keys() ^ files[1].keys())} in one of two"
    if files[0].keys() != (before := _tensors(folder / "model").keys()):
        return f"wrong: tensors {sorted(files[0].keys() ^ before)} are lost or new"
    if different := [key for key, tensor in files[0].items() if not _same(tensor, files[1][key])]:
        return f"wrong: {len(different)} tensors differ, {different[0]} first"
    share, has_experts = share_in_reach(folder / "model", whole.linears)
    different = _different_perplexity(whole, streamed)
    if different and has_experts:
        # Rounding in bfloat16 can send a token to another expert.
        different = _different_perplexity(*_prune_both(folder, "float32"))
    if different:
        return f"wrong: {different}"
    if has_experts and share < LEAST_OF_EXPERTS:
        return f"wrong: {len(whole.linears)} linears, only {share:.1%} in reach"
    return f"ok: {len(whole.linears)} linears, {share:.1%} in reach"


def _different_perplexity(whole, streamed) -> str | None:
    for which in ("dense", "pruned"):
        own, by_blocks = whole.perplexity[which], streamed.perplexity[which]
        if not math.isclose(by_blocks, own, rel_tol=CLOSE):
            return f"{which}, a perplexity of {own:.4f}, by blocks {by_blocks:.4f}"
    return None


def share_in_reach(folder: Path, linears: dict) -> tuple[float, bool]:
    """Pruned weights of all weights of the blocks' matrices; whether the model has experts.

    Routers (a row for each expert), depthwise convolutions and LongCat's projections of experts that pass
    their input on do not count.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    blocks = re.match(r".*?\.(?=\d+\.)", next(iter(linears)))[0]
    parameters, total = dict(model.named_parameters(remove_duplicate=False)), 0
    for name, parameter in parameters.items():
        if name.endswith(".experts.gate_up_proj"):
            parameter = parameter[: len(parameters[name.replace("gate_up_proj", "down_proj")])]
        router = parameter.ndim == 2 and len(parameter) <= ROUTER_ROWS
        matrix = parameter.ndim > 1 and min(parameter.shape[-2:]) > 1 and not router
        if name.startswith(blocks) and (matrix or name.removesuffix(".weight") in linears):
            total += parameter.numel()
    share = sum(linear.weights for linear in linears.values()) / total
    return share, any("experts." in name for name in parameters)


def _prune_both(folder: Path, dtype: str) -> tuple:
    """The reports of a run in memory, measured by forwards of the whole model, and of a streamed one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "open_meta_model", _refuse)
        patch.setattr(in_memory, "runs_by_blocks", lambda *_: False)
        whole = _prune(folder, "whole", dtype)
    return whole, _prune(folder, "streamed", dtype)


def _prune(folder: Path, kind: str, dtype: str):
    ids = tokens()
    options = dict(prune_method="gated", sparsity_type="2:4", dtype=dtype, batch_size=2, device="cpu")
    options |= dict(dataset=ids, seqlen=ids.shape[1], eval_dataset=ids)
    return wanda_fast.prune(str(folder / "model"), save_model=folder / f"{kind}-{dtype}", **options)


def _refuse(*_arguments):
    raise errors.NotStreamableError("it is to be loaded whole")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
