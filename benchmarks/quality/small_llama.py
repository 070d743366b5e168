"""Trains a small byte-level Llama on a text, as a second model whose perplexity reacts to pruning.

python -m benchmarks.quality.small_llama wiki.valid.raw DIR --steps 2000
"""

from pathlib import Path

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WINDOW = 256
BYTES = dict(vocab_size=256, max_position_embeddings=512, tie_word_embeddings=True)
SIZES = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def train(config: PreTrainedConfig, ids: torch.Tensor, steps: int, batch: int, bf16: bool) -> PreTrainedModel:
    """AdamW, one cycle; the same seed gives the same model on the same machine."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        starts = torch.randint(len(ids) - WINDOW - 1, (batch,))
        windows = torch.stack([ids[start : start + WINDOW + 1] for start in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(windows, labels=windows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            typer.echo(f"step {step}: loss {loss.item():.3f}")
    return model.eval()


def train_and_save(
    config: PreTrainedConfig, text: Path, out: Path, steps: int, batch: int, bf16: bool
) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    train(config, ids, steps, batch, bf16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(text: Path, out: Path, steps: int = 1500, batch: int = 16, bf16: bool = True) -> None:
    train_and_save(LlamaConfig(**BYTES, **SIZES), text, out, steps, batch, bf16)


if __name__ == "__main__":
    typer.run(main)
