"""Seconds of a whole job on many GPUs, computed from pieces that were measured on one: docs/scaling.md.

    python -m benchmarks.jobs.scaling --model llama3-70b --method sparsegpt

Rates are those of the H200's jobs on Llama-2-7B's shape (benchmarks/results). Bandwidths of links and disks
were not measured: they are arguments.
"""

from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks import program
from benchmarks.jobs.model_shapes import Work

# FLOP/s on an H200: a block's forward in bf16; Hessians (half of a symmetric product); factor and update.
FORWARD, HESSIAN, SOLVE = 6.0e14, 3.7e14, 1.2e13
GPUS_OF_MACHINE = 8
# Seconds of one collective beside its bytes, and collectives of a block.
LATENCY, COLLECTIVES = 5e-5, 12


@dataclass(frozen=True)
class Shape:
    """A model: `experts` per block, of which a token goes through `chosen`; 1 and 1 for a dense one."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    experts: int = 1
    chosen: int = 1

    def work(self, nsamples: int, seqlen: int) -> Work:
        linears = self.attention + self.chosen * self.expert
        return Work(linears, self.heads, self.head_dim, self.blocks, nsamples, seqlen)

    @property
    def attention(self) -> list[tuple[int, int]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q)]

    @property
    def expert(self) -> list[tuple[int, int]]:
        return 2 * [(self.inner, self.hidden)] + [(self.hidden, self.inner)]

    @property
    def weights_of_block(self) -> int:
        return sum(rows * columns for rows, columns in self.attention + self.experts * self.expert)


SHAPES = {
    "llama2-7b": Shape(4096, 11_008, 32, 32, 128, 32),
    "llama3-8b": Shape(4096, 14_336, 32, 8, 128, 32),
    "llama3-70b": Shape(8192, 28_672, 64, 8, 128, 80),
    "qwen3-235b-a22b": Shape(4096, 1536, 64, 4, 128, 94, 128, 8),
}


def predict(
    shape: Shape,
    method: str,
    gpus: int,
    nsamples: int,
    seqlen: int,
    inside: float,
    between: float,
    disk: float,
) -> dict[str, float]:
    """Seconds by part, of the slowest rank; `all` is their sum, or the disk's time if that is longer.

    Args:
        inside, between: bytes a second of one GPU's link to those of its machine, and to other machines.
        disk: bytes a second that a machine reads, and writes at the same time.
    """
    machines = -(-gpus // GPUS_OF_MACHINE)
    link = inside if machines == 1 else between
    # Whole samples are dealt: with more ranks than samples, some have none.
    share = -(-nsamples // gpus) / nsamples
    tokens = nsamples * seqlen * share
    weights = 2 * shape.weights_of_block
    parts = {"forward": shape.work(nsamples, seqlen).flops("wanda_fast") * share / FORWARD}
    moved = weights
    if method == "sparsegpt":
        q = shape.heads * shape.head_dim
        inputs = [shape.hidden, q, *(shape.experts == 1) * [shape.hidden, shape.inner]]
        of_expert = [shape.hidden, shape.inner] if shape.experts > 1 else []
        squares = sum(n**2 for n in inputs) + shape.chosen * sum(n**2 for n in of_expert)
        parts["Hessians"] = shape.blocks * squares * tokens / HESSIAN
        own = -(-shape.experts // gpus) if of_expert else 0
        factors = [
            sum(inputs[rank::gpus], 0) and sum(n**3 for n in inputs[rank::gpus]) for rank in range(gpus)
        ]
        solved = max(factors) * 2 / 3 + own * sum(n**3 for n in of_expert) * 2 / 3
        solved += sum(rows * columns**2 for rows, columns in shape.attention) / gpus
        of_mlp = sum(rows * columns**2 for rows, columns in shape.expert)
        solved += own * of_mlp if of_expert else of_mlp / gpus
        parts["factor, update"] = shape.blocks * solved / SOLVE
        held = 4 * (sum(n**2 for n in inputs) + shape.experts * sum(n**2 for n in of_expert))
        # An all-reduce moves everything twice; the factors of inputs that are not experts' are sent.
        moved += 2 * held + 4 * sum(n**2 for n in inputs)
    if gpus > 1:
        parts["collectives"] = shape.blocks * (moved / link + LATENCY * (COLLECTIVES + gpus))
    parts["disk"] = shape.blocks * weights / (disk * machines)
    working = sum(seconds for part, seconds in parts.items() if part != "disk")
    return parts | {"all": max(working, parts["disk"])}


def main(
    model: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama3-70b",
    method: Annotated[str, typer.Option(help="wanda or sparsegpt.")] = "wanda",
    gpus: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8,64,512",
    nsamples: int = 128,
    seqlen: int = 2048,
    inside: Annotated[float, typer.Option(help="GB/s of a GPU's link inside a machine.")] = 400.0,
    between: Annotated[float, typer.Option(help="GB/s of a GPU's link between machines.")] = 40.0,
    disk: Annotated[float, typer.Option(help="GB/s that a machine reads and writes.")] = 4.0,
) -> None:
    """Print a table of seconds by part."""
    names: list[str] = []
    for count in map(int, gpus.split(",")):
        rates = (inside * 1e9, between * 1e9, disk * 1e9)
        parts = predict(SHAPES[model], method, count, nsamples, seqlen, *rates)
        if not names or set(parts) - set(names):
            names = list(predict(SHAPES[model], method, 2, nsamples, seqlen, *rates))
            typer.echo("| GPUs | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
        values = (f"{parts[name]:.1f}" if name in parts else "-" for name in names)
        typer.echo(f"| {count} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    program.run(app)
