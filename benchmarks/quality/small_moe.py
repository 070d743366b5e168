"""Trains a small byte-level mixture of experts (8 experts, 2 a token) on a text, as `small_llama` does.

python -m benchmarks.quality.small_moe wiki.valid.raw DIR --steps 1500
"""

from pathlib import Path

import typer
from transformers import MixtralConfig

from benchmarks.quality.small_llama import BYTES, train_and_save

SIZES = dict(hidden_size=192, intermediate_size=264, num_hidden_layers=4, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2)
# The load-balancing loss keeps every expert in use.
BALANCE = dict(output_router_logits=True, router_aux_loss_coef=0.02)


def main(text: Path, out: Path, steps: int = 1500, batch: int = 16, bf16: bool = True) -> None:
    train_and_save(MixtralConfig(**BYTES, **SIZES, **BALANCE), text, out, steps, batch, bf16)


if __name__ == "__main__":
    typer.run(main)
