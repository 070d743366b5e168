"""`python -m benchmarks.visit.rates`: the roofs, and other rates that the predictions in LOG.md rest on.

JSON: {"roofs": ..., "rates": [{"name", "value", "unit", "note"}], "clocks": what nvidia-smi said just after}.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import machine, roofs, timing

REPEATS = 10
SUSTAINED, SUSTAINED_S = "bf16 matmul 8192x8192x8192, for 4 s", 4.0
SHAPE = (11008, 4096)  # of the co-activation's sum in Llama-2-7B
TOKENS = (2048, 8192, 16384, 32768)


def rates(device: str, quick: bool) -> list[dict]:
    """fp32 matmuls without TF32; 16-bit matmuls that contract over tokens, added to fp32 and plain; and what
    a card keeps up once its power limit has slowed it down."""
    torch.backends.cuda.matmul.allow_tf32 = False
    side = 256 if quick else 4096
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    found = [_rate(f"fp32 matmul {side}x{side}x{side}", lambda: torch.mm(a, b), 2 * side**3, device)]
    (n_out, n_in), all_tokens = ((32, 16), (64,)) if quick else (SHAPE, TOKENS)
    for n_tokens in all_tokens:
        gate, x = (torch.randn(n_tokens, n, device=device).bfloat16() for n in (n_out, n_in))
        acc = torch.zeros(n_out, n_in, device=device)
        size, flops = f"{n_out}x{n_in}, {n_tokens} tokens", 2 * n_tokens * n_out * n_in

        def add(acc=acc, gate=gate, x=x) -> None:
            torch.addmm(acc, gate.t(), x, out_dtype=torch.float32, out=acc)

        found.append(_rate(f"bf16 addmm to fp32 {size}", add, flops, device))
        found.append(_rate(f"bf16 matmul {size}", lambda gate=gate, x=x: gate.t() @ x, flops, device))
    return [*found, _sustained(device, quick)]


def _sustained(device: str, quick: bool) -> dict:
    """bf16 matmuls without a pause, by the second half of the time; the clock and power while they run."""
    side, calls, seconds = (64, 2, 0.1) if quick else (8192, 100, SUSTAINED_S)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out, stopwatch = torch.empty_like(a), timing.stopwatch_of(device)

    def many() -> None:
        for _ in range(calls):
            torch.mm(a, b, out=out)

    laps: list[float] = []
    while sum(laps) < seconds:
        laps.append(stopwatch(many))
    later = laps[len(laps) // 2 :]
    many()
    clocks = machine.clocks() if device == "cuda" else {}
    note = ", ".join(f"{name} {clocks[name]}" for name in ("clocks.sm", "power.draw") if name in clocks)
    value = 2 * side**3 * calls * len(later) / sum(later) / 1e12
    return {"name": SUSTAINED, "value": value, "unit": "TFLOP/s", "note": note}


def _rate(name: str, call: Callable[[], object], flops: int, device: str) -> dict:
    """TFLOP/s by the median call; none where torch cannot do it here."""
    stopwatch = timing.stopwatch_of(device)
    try:
        times = sorted([stopwatch(call) for _ in range(REPEATS + 2)][2:])
    except (NotImplementedError, RuntimeError, TypeError) as error:
        return {"name": name, "value": None, "unit": "TFLOP/s", "note": str(error)[:80]}
    return {"name": name, "value": flops / times[len(times) // 2] / 1e12, "unit": "TFLOP/s", "note": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    measured = roofs.measure(options.device, options.quick)
    found = rates(options.device, options.quick)
    clocks = machine.clocks() if options.device == "cuda" else {}
    options.out.write_text(json.dumps({"roofs": asdict(measured), "rates": found, "clocks": clocks}))


if __name__ == "__main__":
    main()
