"""The whole job on one model: `wanda_fast.prune` against the published pipeline in plain PyTorch.

    python -m benchmarks.jobs.bench_prune_model --model DIR --dtype float32,bfloat16 --sequential block,linear
    python -m benchmarks.jobs.bench_prune_model --shape llama2-7b --reference-blocks 2

Each job runs in a process of its own, after a tiny one that is not timed. A round runs every job once, every
other round in reverse order. With --model, a job reads a checkpoint's folder and writes one; with --shape, it
prunes a live model with random weights. A factor is the published pipeline's wall time over ours, medians of
the rounds. It is printed only where both prune the same weights.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.core import machine
from benchmarks.core.results import compact_json, replace_file
from benchmarks.jobs import model_shapes, model_table
from benchmarks.jobs.model_table import KEYS
from benchmarks.jobs.published_pipeline import METHODS

DEFAULTS = {
    "cpu": dict(nsamples=16, seqlen=512, gemm=4096, dtype=["float32", "bfloat16"]),
    "cuda": dict(nsamples=128, seqlen=2048, gemm=16384, dtype=["bfloat16"]),
}
Job = tuple[str, str, str, str]  # in the order of KEYS


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    report = measure(options)
    if options.out:
        report = _with_earlier_runs(report, options.out)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(options.out, compact_json(report))
    print(model_table.page(report))
    return 1 if any(row["agreement"] is False for row in model_table.rows(report)) else 0


def measure(options: argparse.Namespace) -> dict:
    """All runs of all rounds, and what they were made with, ready for JSON."""
    config = model_shapes.config_of(options.model, options.shape)
    work = model_shapes.Work.of(config, options.nsamples, options.seqlen)
    jobs, not_run = _jobs(options)
    workload = {
        "model": options.shape or Path(options.model).name,
        "sparsity_type": options.sparsity_type,
        "nsamples": options.nsamples,
        "seqlen": options.seqlen,
        "blocks": work.n_blocks,
        "published_blocks": options.reference_blocks or work.n_blocks,
        "gemm_tokens": options.gemm_tokens,
    }
    flops = {"published": work.flops("published"), "block": work.flops("wanda_fast")}
    flops["linear"] = work.flops("wanda_fast", "linear")
    report = {"workload": workload, "flops": flops, "machine": machine.describe(options.device)}
    report |= {"not_run": not_run, "gemm": [], "runs": []}
    with tempfile.TemporaryDirectory(prefix="bench_prune_model") as folder:
        torch.save(_tokens(options, config), Path(folder) / "tokens.pt")
        for index in range(options.rounds):
            _round(options, jobs, Path(folder), index, report)
    return report


def _with_earlier_runs(report: dict, file: Path) -> dict:
    """Runs of the same work are kept: a machine that is quiet only for minutes is measured bit by bit."""
    if not file.exists():
        return report
    earlier = model_table.read(file)
    if earlier["workload"] != report["workload"]:
        raise SystemExit(f"{file} holds runs of other work: {earlier['workload']}")
    if different := machine.difference(earlier["machine"], report["machine"]):
        raise SystemExit(f"{file} holds runs of another machine: {different}")
    joined = {name: earlier[name] + report[name] for name in ("gemm", "runs")}
    joined["not_run"] = earlier["not_run"] | report["not_run"]
    commits = machine.joined(run["commit"] for run in joined["runs"])
    return report | joined | {"machine": report["machine"] | {"commit": commits}}


def _jobs(options: argparse.Namespace) -> tuple[list[Job], dict[str, str]]:
    """Every job of a round, and why others are left out."""
    from wanda_fast.pruning import methods

    jobs, not_run = [], {}
    for method in options.methods:
        if method not in methods.METHODS:
            not_run[method] = "wanda_fast does not know this method"
            continue
        if method not in METHODS:
            not_run[f"{method}, published"] = "the published pipeline has no such method"
        for dtype in options.dtype:
            jobs += [(method, dtype, "published", "block")] if method in METHODS else []
            jobs += [(method, dtype, "wanda_fast", sequential) for sequential in options.sequential]
    return jobs, not_run


def _tokens(options: argparse.Namespace, config) -> torch.Tensor:
    """The calibration: text through the model's tokenizer if it has one, else random tokens."""
    shape = (options.nsamples, options.seqlen)
    if options.model and (Path(options.model) / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        from wanda_fast.data.calibration import calibration_tokens

        return calibration_tokens("pydoc", AutoTokenizer.from_pretrained(options.model), *shape, 0, None)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def _round(options: argparse.Namespace, jobs: list[Job], folder: Path, index: int, report: dict) -> None:
    """Adds every job's run, and each dtype's rate of matmuls, to the report."""
    for dtype in options.dtype:
        rate = _run(options, {"pipeline": "gemm", "dtype": dtype}, folder)
        report["gemm"].append({"dtype": dtype, **rate})
    found = {}
    for job in reversed(jobs) if index % 2 else jobs:
        own = folder / str(jobs.index(job))
        out = str(own / "out") if options.model else None
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        settings = dict(zip(KEYS, job, strict=True)) | {"masks": str(own / "masks.pt"), "out": out}
        found[job] = _run(options, settings, folder)
        print(f"round {index + 1}: {', '.join(job)}: {found[job]['wall']:.2f} s", file=sys.stderr, flush=True)
    for job, result in found.items():
        made_by = {"masks": _agreement(folder, jobs, job), "commit": report["machine"]["commit"]}
        report["runs"].append({**dict(zip(KEYS, job, strict=True)), **result, **made_by})


def _run(options: argparse.Namespace, settings: dict, folder: Path) -> dict:
    """One job in a process of its own."""
    common = ("model", "shape", "device", "nsamples", "seqlen", "gemm_tokens", "reference_blocks")
    settings = {name: getattr(options, name) for name in common} | settings
    settings |= {"tokens": str(folder / "tokens.pt"), "pattern": options.sparsity_type}
    asked, answered = folder / "settings.json", folder / "result.json"
    asked.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "benchmarks.jobs.model_run", str(asked), str(answered)]
    subprocess.run(command, check=True, cwd=machine.ROOT)
    return json.loads(answered.read_text())


def _agreement(folder: Path, jobs: list[Job], job: Job) -> dict[str, float] | None:
    """Share of weights that are zero in both or in neither, of block 0's first linear and of two blocks:
    against the published pipeline in the same dtype."""
    other = (*job[:2], "published", "block")
    if other not in jobs or job == other:
        return None
    ours, theirs = (torch.load(folder / str(jobs.index(each)) / "masks.pt") for each in (job, other))
    same = {name: (ours[name] == theirs[name]).float().mean().item() for name in theirs}
    by_block: dict[str, list[float]] = {}
    for name, share in same.items():
        by_block.setdefault(f"block {name.partition('.')[0]}", []).append(share)
    means = {block: statistics.mean(shares) for block, shares in by_block.items()}
    return {"first linear": next(iter(same.values()))} | means


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
    parser.add_argument("--nsamples", type=int, help="default: 16 on a CPU, 128 on a GPU")
    parser.add_argument("--seqlen", type=int, help="default: 512 on a CPU, 2048 on a GPU")
    parser.add_argument("--device", choices=DEFAULTS, help="default: the GPU where torch sees one")
    parser.add_argument("--rounds", type=int, default=2)
    words = dict(type=int, metavar="N", help="run the published pipeline on the first N blocks only")
    parser.add_argument("--reference-blocks", **words)
    parser.add_argument("--out", type=Path, help="JSON file; runs of the same work that it holds are kept")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS[options.device]
    options.nsamples = options.nsamples or defaults["nsamples"]
    options.seqlen = options.seqlen or defaults["seqlen"]
    options.dtype, options.gemm_tokens = options.dtype or defaults["dtype"], defaults["gemm"]
    if options.model:
        options.model = str(Path(options.model).resolve())
    return options


if __name__ == "__main__":
    raise SystemExit(main())
