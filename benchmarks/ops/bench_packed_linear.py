"""packed_linear against torch's dense product, as in decoding on a CPU.

    python -m benchmarks.ops.bench_packed_linear [--threads 1 2] [--rows 1 8]

Half of each row is kept. Every call reads another copy of the weight, and the copies together are several
times the last cache, as a model's weights are. The four products take turns. A ratio is the median over the
rounds, each against the faster dense product of that round. Results are first compared with fp64.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

import wanda_kernels
from benchmarks.core import timing
from wanda_kernels import PackedRows

SHAPES = {
    "SmolLM2-135M q_proj": (576, 576),
    "SmolLM2-135M up_proj": (1536, 576),
    "SmolLM2-135M down_proj": (576, 1536),
    "Llama-3.2-1B q_proj": (2048, 2048),
    "Llama-3.2-1B up_proj": (8192, 2048),
    "Llama-3.2-1B down_proj": (2048, 8192),
}
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float32: 1e-4}  # of the largest result
Call = Callable[[int], Tensor]  # of the copy's number

COLUMNS = ("shape", "rows of x", "threads", "dense bf16", "dense fp32", "packed bf16", "packed fp32")
COLUMNS += ("packed bf16 against the faster dense", "packed fp32 against the faster dense")


def pruned(shape: tuple[int, int]) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    wanda_kernels.prune_rows_(weight, None, shape[1] // 2)
    return weight


def calls_of(weight: Tensor, x: Tensor, dtype: torch.dtype, n_copies: int) -> dict[str, Call]:
    """A dense and a packed product in that dtype, judged."""
    weight, x = weight.to(dtype), x.to(dtype)
    packed = wanda_kernels.pack_rows(weight)
    dense_copies = [weight.clone() for _ in range(n_copies)]
    packed_copies = [PackedRows(packed.bits.clone(), packed.values.clone(), None) for _ in range(n_copies)]
    name = str(dtype).removeprefix("torch.")
    calls = {
        f"dense {name}": lambda i: F.linear(x, dense_copies[i]),
        f"packed {name}": lambda i: wanda_kernels.packed_linear(x, packed_copies[i]),
    }
    expected = x.double() @ weight.double().t()
    for what, call in calls.items():
        error = (call(0).double() - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[dtype], f"{what} is wrong by {error:g}"
    return calls


def times_of(calls: dict[str, Call], n_copies: int, n_rounds: int) -> dict[str, list[float]]:
    """Seconds of a call: the mean over all copies, once a round."""
    times = {name: [] for name in calls}
    for _, (name, call) in product(range(n_rounds), calls.items()):
        start = time.perf_counter()
        for copy in range(n_copies):
            call(copy)
        times[name].append((time.perf_counter() - start) / n_copies)
    return times


def row(shape: tuple[int, int], n_rows: int, n_threads: int, n_rounds: int) -> str:
    torch.set_num_threads(n_threads)
    n_out, n_in = shape
    n_copies = max(2, 3 * timing.cache_bytes("cpu") // (n_out * n_in * 2))
    weight, x = pruned(shape), torch.randn(n_rows, n_in)
    calls = {}
    for dtype in DTYPES:
        calls |= calls_of(weight, x, dtype, n_copies)
    times = times_of(calls, n_copies, n_rounds)
    dense = [min(both) for both in zip(times["dense bfloat16"], times["dense float32"], strict=True)]
    order = [f"{kind} {dtype}" for kind, dtype in product(("dense", "packed"), ("bfloat16", "float32"))]
    cells = [f"{statistics.median(times[name]) * 1e6:.0f} us" for name in order]
    for name in order[2:]:
        pairs = zip(dense, times[name], strict=True)
        cells.append(f"{statistics.median(other / own for other, own in pairs):.2f}x")
    return f"| {n_out}x{n_in} | {n_rows} | {n_threads} | {' | '.join(cells)} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for n_threads, n_rows, shape in product(options.threads, options.rows, SHAPES.values()):
        print(row(shape, n_rows, n_threads, options.rounds), flush=True)


if __name__ == "__main__":
    main()
