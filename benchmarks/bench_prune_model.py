"""The whole job on one model: `wanda_fast.prune` against the published pipeline in plain PyTorch.

    python -m benchmarks.bench_prune_model --model DIR --dtype float32,bfloat16 --sequential block,linear
    python -m benchmarks.bench_prune_model --shape llama2-7b --reference-blocks 2

Each job runs in a process of its own, after a tiny one that is not timed; a round runs every job once, every
other round in reverse order. From a checkpoint's folder to a folder written; a shape is a live model with
random weights, and nothing is read or written. A factor is the published pipeline's wall time over
ours: the medians of the rounds. It is printed only where both prune the same weights.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine, model_shapes, model_table
from benchmarks.published_pipeline import METHODS

DEFAULTS = {
    "cpu": dict(nsamples=16, seqlen=512, gemm=4096),
    "cuda": dict(nsamples=128, seqlen=2048, gemm=16384),
}
LEAST_AGREEMENT = 0.99  # of the masks of block 0's query: sums in another order swap near ties, no more


@dataclass(frozen=True)
class Job:
    dtype: str
    method: str
    pipeline: str  # "published" or "wanda_fast"
    sequential: str  # "block" or "linear"; of wanda_fast


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    report = measure(options)
    print(model_table.page(report))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row["agreement"] is False for row in report["rows"]) else 0


def measure(options: argparse.Namespace) -> dict:
    """Everything that the page shows, ready for JSON."""
    config = model_shapes.config_of(options.model, options.shape)
    work = model_shapes.Work.of(config, options.nsamples, options.seqlen)
    jobs, not_run = _jobs(options)
    with tempfile.TemporaryDirectory(prefix="bench_prune_model") as folder:
        tokens = Path(folder) / "tokens.pt"
        torch.save(_tokens(options, config), tokens)
        rounds = [_round(options, jobs, Path(folder), index) for index in range(options.rounds)]
        agreements = {job: _agreement(Path(folder), jobs, job) for job in jobs}
    gemm = {dtype: statistics.median(each[dtype] for each in rounds) for dtype in options.dtype}
    published_blocks = options.reference_blocks or work.n_blocks
    rows = [
        _row(job, [each[job] for each in rounds], work, gemm[job.dtype], agreements[job], published_blocks)
        for job in jobs
    ]
    _add_factors(rows)
    return {
        "machine": machine.describe(options.device),
        "model": options.shape or Path(options.model).name,
        "sparsity_type": options.sparsity_type,
        "nsamples": options.nsamples,
        "seqlen": options.seqlen,
        "rounds": options.rounds,
        "published_blocks": published_blocks,
        "blocks": work.n_blocks,
        "flops": {"block": work.flops("wanda_fast"), "linear": work.flops("wanda_fast", "linear")}
        | {"published": work.flops("published")},
        "gemm_tokens": options.gemm_tokens,
        "gemm_flops_per_s": gemm,
        "not_run": not_run,
        "rows": rows,
    }


def _jobs(options: argparse.Namespace) -> tuple[list[Job], dict[str, str]]:
    """Every job of a round, and why others are left out."""
    from wanda_fast import methods

    jobs, not_run = [], {}
    for method in options.methods:
        if method not in methods.METHODS:
            not_run[method] = "wanda_fast does not know this method"
            continue
        if method not in METHODS:
            not_run[f"{method}, published"] = "the published pipeline has no such method"
        for dtype in options.dtype:
            if method in METHODS:
                jobs.append(Job(dtype, method, "published", "block"))
            jobs += [Job(dtype, method, "wanda_fast", sequential) for sequential in options.sequential]
    return jobs, not_run


def _tokens(options: argparse.Namespace, config) -> torch.Tensor:
    """The calibration: text through the model's tokenizer where it has one, else random tokens."""
    shape = (options.nsamples, options.seqlen)
    if options.model and (Path(options.model) / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        from wanda_fast.calibration import calibration_tokens

        return calibration_tokens(
            options.dataset, AutoTokenizer.from_pretrained(options.model), *shape, 0, None
        )
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def _round(options: argparse.Namespace, jobs: list[Job], folder: Path, index: int) -> dict:
    """Job -> its result, dtype -> FLOP/s of matmuls."""
    found = {}
    for dtype in options.dtype:
        settings = {"pipeline": "gemm", "dtype": dtype}
        found[dtype] = _run(options, settings, folder)["flops_per_s"]
    for job in reversed(jobs) if index % 2 else jobs:
        own = folder / str(jobs.index(job))
        out = str(own / "out") if options.model else None
        own.mkdir(exist_ok=True)
        settings = {**vars(job), "masks": str(own / "masks.pt"), "out": out}
        if job.pipeline == "wanda_fast" and out and Path(out).exists():
            _empty(Path(out))
        found[job] = _run(options, settings, folder)
        print(f"round {index + 1}: {vars(job)}: {found[job]['wall']:.2f} s", file=sys.stderr, flush=True)
    return found


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _run(options: argparse.Namespace, settings: dict, folder: Path) -> dict:
    """One job in a process of its own, started by `--launcher` where given."""
    common = ("model", "shape", "device", "nsamples", "seqlen", "gemm_tokens", "reference_blocks")
    settings = {name: getattr(options, name) for name in common} | settings
    settings |= {"tokens": str(folder / "tokens.pt"), "pattern": options.sparsity_type}
    asked, answered = folder / "settings.json", folder / "result.json"
    asked.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "benchmarks.model_run", str(asked), str(answered)]
    subprocess.run([*shlex.split(options.launcher), *command], check=True, cwd=machine.ROOT)
    return json.loads(answered.read_text())


def _agreement(folder: Path, jobs: list[Job], job: Job) -> dict[str, float] | None:
    """Share of weights that are zero in both or in neither, of block 0's first linear and of two blocks:
    against the published pipeline in the same dtype."""
    other = Job(job.dtype, job.method, "published", "block")
    if other not in jobs or job == other:
        return None
    ours, theirs = (torch.load(folder / str(jobs.index(each)) / "masks.pt") for each in (job, other))
    same = {name: (ours[name] == theirs[name]).float().mean().item() for name in theirs}
    blocks = {name.partition(".")[0] for name in same}
    by_block = {
        f"block {block}": statistics.mean(
            value for name, value in same.items() if name.startswith(f"{block}.")
        )
        for block in sorted(blocks, key=int)
    }
    return {"first linear": next(iter(same.values()))} | by_block


def _row(job: Job, results: list[dict], work, gemm: float, agreement: dict | None, blocks: int) -> dict:
    """Medians; a published pipeline that ran on fewer blocks is scaled, but for what does not hang on it."""
    share = work.n_blocks / blocks if job.pipeline == "published" else 1.0
    rounds = [_scaled(result, share) for result in results]
    walls = [each["wall"] for each in rounds]
    seconds = {
        name: statistics.median(each["seconds"][name] for each in rounds) for name in rounds[0]["seconds"]
    }
    passes = seconds["dense pass"] + seconds["one pass"] + seconds["pruned pass"]
    flops = work.flops(job.pipeline, job.sequential)
    return vars(job) | {
        "wall_s": statistics.median(walls),
        "walls_s": walls,
        "seconds": seconds,
        "peak_bytes": max(each["peak_bytes"] for each in results),
        "gemm_share": flops / passes / gemm if passes else None,
        "masks": agreement,
        "agreement": None if agreement is None else agreement["first linear"] >= LEAST_AGREEMENT,
    }


def _scaled(result: dict, share: float) -> dict:
    once = ("read", "block inputs", "write", "other")
    seconds = {name: value * (1 if name in once else share) for name, value in result["seconds"].items()}
    return {"wall": sum(seconds.values()), "seconds": seconds}


def _add_factors(rows: list[dict]) -> None:
    """Of wall times: over the published pipeline in the same dtype, and in float32."""
    published = {
        (row["dtype"], row["method"]): row["wall_s"] for row in rows if row["pipeline"] == "published"
    }
    for row in rows:
        for name, dtype in (("over_same_dtype", row["dtype"]), ("over_float32", "float32")):
            wall = published.get((dtype, row["method"]))
            earned = row["pipeline"] == "wanda_fast" and row["agreement"] and wall is not None
            row[name] = wall / row["wall_s"] if earned else None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder of a Llama-like safetensors checkpoint")
    source.add_argument("--shape", choices=model_shapes.SHAPES, help="random weights in memory")
    words = dict(type=lambda text: text.split(","), metavar="A,B")
    parser.add_argument("--methods", default="wanda,connect", **words)
    parser.add_argument("--sequential", default="block,linear", **words)
    parser.add_argument("--dtype", **words, help="default: float32,bfloat16 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--sparsity-type", default="2:4", help="N:M, or unstructured (one half)")
    parser.add_argument("--dataset", default="pydoc")
    parser.add_argument("--nsamples", type=int, help="default: 16 on a CPU, 128 on a GPU")
    parser.add_argument("--seqlen", type=int, help="default: 512 on a CPU, 2048 on a GPU")
    parser.add_argument("--device", choices=DEFAULTS, help="default: the GPU where torch sees one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--reference-blocks", type=int, help="run the published pipeline on so many blocks only"
    )
    parser.add_argument("--launcher", default="", help="command before each job, such as 'numactl -N 0'")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS[options.device]
    options.nsamples = options.nsamples or defaults["nsamples"]
    options.seqlen = options.seqlen or defaults["seqlen"]
    options.gemm_tokens = defaults["gemm"]
    options.dtype = options.dtype or (["float32", "bfloat16"] if options.device == "cpu" else ["bfloat16"])
    if options.model:
        options.model = str(Path(options.model).resolve())
    return options


if __name__ == "__main__":
    raise SystemExit(main())
