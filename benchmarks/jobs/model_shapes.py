"""Models of random weights for whole jobs: random weights, their blocks' FLOPs, the rate of their matmuls."""

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.core import timing

SHAPES = {  # words, hidden, intermediate, heads, key-value heads, blocks
    "llama2-7b": (32_000, 4096, 11_008, 32, 32, 32),
    "llama3-8b": (32_000, 4096, 14_336, 32, 8, 32),
    "smollm2-135m": (49_152, 576, 1536, 9, 3, 30),
    "tiny": (256, 64, 160, 4, 2, 3),
    # Of Qwen3-30B-A3B's proportions: 128 experts, 8 of them a token.
    "qwen3-30b-a3b-sixth": (32_000, 2048, 768, 32, 4, 8),  # 8 of 48 layers
    "qwen3-moe-half": (32_000, 1024, 384, 16, 2, 4),
    "qwen3-moe-tiny": (256, 64, 32, 4, 2, 2),
}
# Experts, experts of a token, features of a head.
EXPERTS = {
    "qwen3-30b-a3b-sixth": (128, 8, 128),
    "qwen3-moe-half": (128, 8, 64),
    "qwen3-moe-tiny": (8, 2, 64),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("num_hidden_layers",)
REPEATS = 9


@dataclass(frozen=True)
class Work:
    """What the passes of `n_blocks` blocks compute; `linears` `(out, in)` in the order of their calls."""

    linears: list[tuple[int, int]]
    heads: int
    head_dim: int
    n_blocks: int
    nsamples: int
    seqlen: int

    @classmethod
    def of(cls, config, nsamples: int, seqlen: int) -> "Work":
        """Of a transformers config with Llama's names."""
        hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        q, kv = heads * head_dim, config.num_key_value_heads * head_dim
        linears = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
        times = 1
        if getattr(config, "num_experts", None):
            inner, times = config.moe_intermediate_size, config.num_experts_per_tok
        linears += times * [(inner, hidden), (inner, hidden), (hidden, inner)]
        return cls(linears, heads, head_dim, config.num_hidden_layers, nsamples, seqlen)

    def flops(self, pipeline: str, sequential: str = "block") -> int:
        """Of both passes: 2 * tokens * weights a linear, and causal attention, half of it masked away.

        wanda_fast does without the dense pass's last linear and without the last block's pruned pass.
        """
        tokens = self.nsamples * self.seqlen
        last = 2 * tokens * self.linears[-1][0] * self.linears[-1][1]
        block = 2 * tokens * sum(rows * columns for rows, columns in self.linears)
        block += 4 * tokens * (self.seqlen + 1) // 2 * self.heads * self.head_dim
        if pipeline == "published":
            return 2 * self.n_blocks * block
        if sequential == "linear":
            return self.n_blocks * block
        return self.n_blocks * (block - last) + (self.n_blocks - 1) * block


def gemm_rate(work: Work, dtype: torch.dtype, device: str, n_tokens: int) -> float:
    """FLOP/s of a block's linears, `n_tokens` tokens a call: all FLOPs over the sum of medians.

    Of `F.linear`, or of oneDNN's where that is faster: a share of the rate is one of what the machine can do.
    """
    stopwatch, seconds, flops = timing.stopwatch_of(device), 0.0, 0
    for rows, columns in work.linears:
        x = torch.randn(n_tokens, columns, device=device).to(dtype)
        weight = torch.randn(rows, columns, device=device).to(dtype)
        seconds += min(_median(stopwatch, call, x, weight) for call in _matmuls(dtype, device))
        flops += 2 * n_tokens * rows * columns
    return flops / seconds


def _matmuls(dtype: torch.dtype, device: str) -> list:
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if onednn is None or device != "cpu" or dtype != torch.float32:
        return [F.linear]
    return [F.linear, lambda x, weight: onednn(x, weight, None, "none", [], "")]


def _median(stopwatch, call, x: torch.Tensor, weight: torch.Tensor) -> float:
    return statistics.median([stopwatch(lambda: call(x, weight)) for _ in range(REPEATS + 2)][2:])


def config_of(model: str | None, shape: str | None):
    """The transformers config of a checkpoint's folder or of a named shape."""
    from transformers import AutoConfig, LlamaConfig, Qwen3MoeConfig

    if model:
        return AutoConfig.from_pretrained(model)
    sizes = dict(zip(SIZES, SHAPES[shape], strict=True)) | {"max_position_embeddings": 4096}
    if shape not in EXPERTS:
        return LlamaConfig(**sizes)
    experts, chosen, head_dim = EXPERTS[shape]
    sizes |= {"moe_intermediate_size": sizes["intermediate_size"], "num_experts": experts}
    return Qwen3MoeConfig(**sizes, num_experts_per_tok=chosen, head_dim=head_dim)


def random_model(shape: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The same weights whenever it is called with the same arguments; norms are ones."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(None, shape)).to(dtype)
    rotary = type(model.model.rotary_emb)(model.config).to(device)
    model.to_empty(device=device)
    model.model.rotary_emb = rotary  # its buffers are computed, not loaded
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.data.fill_(1)
    return model.eval()
