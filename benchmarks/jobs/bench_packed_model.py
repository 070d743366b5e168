"""A pruned model, packed, beside the dense one in 16, 8 and 4 bits: bytes, memory, speed, perplexity.

    python -m benchmarks.jobs.bench_packed_model --dense DIR --packed DIR50 --packed DIR60
    python -m benchmarks.jobs.bench_packed_model --shape llama3.2-1b

Each variant runs in processes of its own, which take turns, on a CPU. `--shape` makes folders of random
weights.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import wanda_fast
from benchmarks import program
from benchmarks.core import machine, tables
from benchmarks.jobs.integer_linears import Int4Linear, Int8Linear, quantize_

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("num_hidden_layers", "tie_word_embeddings")
SHAPES = {
    "llama3.2-1b": (128_256, 2048, 8192, 32, 8, 16, True),
    "smollm2-135m": (49_152, 576, 1536, 9, 3, 30, True),
    "tiny": (320, 64, 192, 4, 2, 2, True),
}
INTEGERS = {"dense int8": Int8Linear, "dense int4": Int4Linear}
SPARSITIES = (0.5, 0.6)
HEADER = ("", "MB", "peak MB", "prefill", "decode, 1", "decode, 8", "perplexity")
HEADERS_OF = "tokens a second; decode at batch 1 and 8"


def make_folders(shape: str, out: Path) -> tuple[Path, list[Path]]:
    """A model of random bf16 weights, and packed ones, pruned by magnitude."""
    config = LlamaConfig(**dict(zip(SIZES, SHAPES[shape], strict=True)))
    dense = out / "dense"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(dense)
    packed = []
    for sparsity in SPARSITIES:
        packed.append(out / f"packed-{sparsity}")
        options = dict(prune_method="magnitude", sparsity_ratio=sparsity, eval_dataset=None, save_packed=True)
        wanda_fast.prune(str(dense), save_model=packed[-1], prune_granularity="row", **options)
    return dense, packed


def load(variant: str, folder: str) -> torch.nn.Module:
    dtype = torch.float32 if variant == "dense fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return quantize_(model, INTEGERS[variant]) if variant in INTEGERS else model


@torch.inference_mode()
def run(variant: str, folder: str, prompt: int, steps: int, windows: int) -> dict:
    """What one process measures."""
    # Code that transformers loads with the first model, and torch with the first product, is not its memory.
    config = LlamaConfig(**dict(zip(SIZES, SHAPES["tiny"], strict=True)))
    AutoModelForCausalLM.from_config(config)(torch.zeros(1, 9, dtype=torch.long))
    before = _status("VmRSS")
    model = load(variant, folder)
    # What the conversion to integers has freed goes back to the system, and VmHWM begins anew.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    found = {"bytes": _bytes(model)}
    model(_ids(model, 1, 9))
    for batch, words in ((1, prompt), (1, 1), (8, 1)):
        found[f"{'prefill' if words > 1 else 'decode'} {batch}"] = _rate(model, batch, words, steps)
    found["peak"] = _status("VmHWM") - before
    if windows:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        options = dict(tokenizer=tokenizer, max_windows=windows)
        found["perplexity"] = wanda_fast.perplexity(model, "pydoc", 512, **options)
    return found


def _rate(model: torch.nn.Module, batch: int, words: int, steps: int) -> float:
    """Tokens a second of one prefill, or of `steps` decoding steps after 32 tokens."""
    if words > 1:
        ids = _ids(model, batch, words)
        begin = time.perf_counter()
        model(ids, logits_to_keep=1)
        return batch * words / (time.perf_counter() - begin)
    given = model(_ids(model, batch, 32), use_cache=True)
    begin = time.perf_counter()
    for _ in range(steps):
        given = model(given.logits[:, -1:].argmax(-1), past_key_values=given.past_key_values)
    return batch * steps / (time.perf_counter() - begin)


def _ids(model: torch.nn.Module, batch: int, words: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (batch, words), generator=generator)


def _bytes(model: torch.nn.Module) -> int:
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.nbytes for each in tensors.values())


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def _in_process(variant: str, folder: Path, options: list[str]) -> dict:
    words = [
        sys.executable,
        "-m",
        "benchmarks.jobs.bench_packed_model",
        "--dense",
        str(folder),
        "--only",
        variant,
    ]
    said = subprocess.run(words + options, capture_output=True, text=True, check=True, env=os.environ)
    return json.loads(said.stdout.splitlines()[-1])


def _line(variant: str, runs: list[dict]) -> list[str]:
    rates = (
        f"{statistics.median(each[name] for each in runs):,.1f}"
        for name in ("prefill 1", "decode 1", "decode 8")
    )
    ppl = f"{runs[0]['perplexity']:.2f}" if "perplexity" in runs[0] else "-"
    return [variant, f"{runs[0]['bytes'] / 1e6:,.0f}", f"{runs[0]['peak'] / 1e6:,.0f}", *rates, ppl]


def main(
    dense: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    packed: Annotated[list[Path] | None, typer.Option(help="Packed folders of the pruned model.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights: {', '.join(SHAPES)}.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prefill.")] = 512,
    steps: Annotated[int, typer.Option(help="Decoding steps.")] = 32,
    rounds: Annotated[int, typer.Option(help="Processes of each variant.")] = 3,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens for the perplexity; 0: none.")] = 16,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the table, or with --only what one process measured."""
    if only:
        typer.echo(json.dumps(run(only, str(dense), prompt, steps, windows)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if shape:
            (dense, packed), windows = make_folders(shape, Path(folder)), 0
        folders = dict.fromkeys(("dense bf16", "dense fp32", *INTEGERS), dense)
        folders |= {f"packed {each.name}": each for each in packed or ()}
        options = [f"--prompt={prompt}", f"--steps={steps}"]
        found: dict[str, list[dict]] = {name: [] for name in folders}
        for number in range(rounds):
            last = [f"--windows={windows * (number == 0)}"]
            for name in folders:
                found[name].append(_in_process(name, folders[name], options + last))
    typer.echo(f"{machine.sentence(machine.describe('cpu'))}\nRates are {HEADERS_OF}.\n")
    typer.echo(tables.markdown(HEADER, [_line(*each) for each in found.items()]))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    program.run(app)
