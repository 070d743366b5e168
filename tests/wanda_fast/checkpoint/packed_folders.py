"""Folders of pruned checkpoints, made without a run, and changes to files of packed ones."""

import json
import shutil
from pathlib import Path

import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny_models import FAMILIES, GQA
from wanda_fast.model.architecture import find_blocks

PATTERNS = {
    # Every row keeps the same number of weights.
    "rows": lambda weight: weight.abs().argsort(-1).argsort(-1) >= weight.shape[-1] // 2,
    "2:4": lambda weight: (weight.reshape(-1, 4).abs().argsort(-1).argsort(-1) >= 2).view_as(weight),
    # One threshold for the matrix; row 0 has no weight left.
    "uneven": lambda weight: (weight.abs() > weight.abs().median()).index_fill(0, torch.tensor([0]), False),
}


def pruned(family: str, dtype: torch.dtype, pattern: str) -> hf.PreTrainedModel:
    """A tiny model whose prunable weights have zeros."""
    model = _odd() if family == "odd widths" else FAMILIES[family]()
    for block in find_blocks(model.to(dtype)):
        for linear in block.linears:
            weight = linear.weight.data
            weight.masked_fill_(~PATTERNS[pattern](weight.float()), 0.0)
    return model


def _odd() -> hf.PreTrainedModel:
    config = hf.LlamaConfig(**GQA | dict(hidden_size=44, intermediate_size=57, num_attention_heads=2))
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


def saved(model: hf.PreTrainedModel, folder: Path, shards: int = 1) -> Path:
    """The folder of the model, in about that many shards."""
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=10**9 if shards == 1 else nbytes // shards)
    return folder


def saved_fused(model: hf.PreTrainedModel, folder: Path) -> Path:
    """The folder of a model with the model's own names: all experts of a block are one tensor."""
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def changed(packed: Path, folder: Path, change) -> Path:
    """A copy of a packed folder whose tensors, by name, and metadata `change` has changed."""
    shutil.copytree(packed, folder)
    file = folder / "packed.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    return folder


def with_entry(packed: Path, folder: Path, change) -> Path:
    """A copy of a packed folder whose entry in config.json `change` has changed."""
    shutil.copytree(packed, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder
