"""A block's forward on a CPU, operation by operation: kernels of ours against torch's, in turn.

    python -m benchmarks.block_forward --tokens 4096

The product with a pruned weight counts the operations of the dense one. Whatever this machine or dtype has no
kernel for is left to torch, and says so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch.utils.benchmark import Timer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

import wanda_kernels
from benchmarks import machine, shapes, tables
from wanda_kernels.native import forward as native_forward

HEAD, HEADS, SHARED, SEQUENCE = 64, 9, 3, 512  # SmolLM2-135M's attention


@dataclass(frozen=True)
class Case:
    operation: str
    shape: str
    taken: bool  # by a kernel of ours, here
    ours: Callable[[], torch.Tensor]
    torchs: Callable[[], torch.Tensor]
    flops: int = 0


def _linear(name: str, x: torch.Tensor, weight: torch.Tensor, ours: Callable, sparse: bool) -> Case:
    return Case(
        name,
        f"{len(x)}x{x.shape[1]} to {len(weight)}",
        native_forward.multiplies(x, weight, sparse=sparse),
        lambda: ours(x, weight),
        lambda: F.linear(x, weight),
        2 * x.numel() * len(weight),
    )


def cases(n_tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    hidden, wide = shapes.SMOLLM2.hidden, shapes.SMOLLM2.intermediate
    for n_out, n_in in ((hidden, hidden), (wide, hidden), (hidden, wide)):
        x, weight = torch.randn(n_tokens, n_in).to(dtype), torch.randn(n_out, n_in).to(dtype)
        yield _linear("linear", x, weight, native_forward.dense_linear, sparse=False)
        pruned = weight.clone()
        wanda_kernels.prune_nm_(pruned, None, 2, 4)
        yield _linear("linear, weight 2:4", x, pruned, native_forward.sparse_linear, sparse=True)
    q, k, v = (
        torch.randn(n_tokens // SEQUENCE, SEQUENCE, heads, HEAD).to(dtype).transpose(1, 2)
        for heads in (HEADS, SHARED, SHARED)
    )
    yield Case(
        "causal attention",
        f"{len(q)}x{HEADS}x{SEQUENCE}x{HEAD}",
        native_forward.attends(q, k, v),
        lambda: native_forward.causal_attention(q, k, v),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        2 * q.numel() * SEQUENCE,  # half of the square, two products
    )
    rows, norm = torch.randn(n_tokens, hidden).to(dtype), LlamaRMSNorm(hidden).to(dtype)
    yield Case(
        "RMSNorm",
        f"{n_tokens}x{hidden}",
        native_forward.takes_rows(rows),
        lambda: native_forward.rms_norm(rows, norm.weight, norm.variance_epsilon),
        lambda: norm(rows),
    )
    cos, sin = torch.randn(2, 1, SEQUENCE, HEAD).to(dtype)
    yield Case(
        "rotary embedding",
        f"{len(q)}x{HEADS}x{SEQUENCE}x{HEAD}",
        native_forward.rotates(q, cos, sin),
        lambda: native_forward.rotary(q, cos, sin),
        lambda: q * cos.unsqueeze(1) + rotate_half(q) * sin.unsqueeze(1),
    )
    gate, up = torch.randn(2, n_tokens, wide).to(dtype)
    yield Case(
        "silu(gate) * up",
        f"{n_tokens}x{wide}",
        native_forward.takes_rows(gate),
        lambda: native_forward.gated_product(gate, up, "silu"),
        lambda: F.silu(gate) * up,
    )


@torch.no_grad()
def main(
    tokens: Annotated[int, typer.Option(help="Tokens of a batch, a multiple of 512.")] = 4096,
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 0.5,
) -> None:
    """Medians of one call."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases(tokens, dtype):
            torchs = _median(case.torchs, seconds)
            ours = _median(case.ours, seconds) if case.taken else None
            rows.append(
                (
                    case.operation,
                    case.shape,
                    str(dtype).removeprefix("torch."),
                    f"{ours * 1e3:.2f} ms" if ours else "left to torch",
                    f"{torchs * 1e3:.2f} ms",
                    f"{torchs / ours:.2f}x" if ours else "-",
                    f"{case.flops / ours / 1e9:.0f} GFLOP/s" if ours and case.flops else "-",
                )
            )
    print(machine.sentence(machine.describe("cpu")) + "\n")
    print(tables.markdown(("operation", "shape", "dtype", "ours", "torch", "factor", "ours, rate"), rows))


def _median(call: Callable[[], torch.Tensor], seconds: float) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


if __name__ == "__main__":
    typer.run(main)
