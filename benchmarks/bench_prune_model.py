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
import shutil
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


SAME_MACHINE = ("cpu", "gpu", "cpu_capability", "threads", "torch")  # whose runs may stand in one table


@dataclass(frozen=True)
class Job:
    dtype: str
    method: str
    pipeline: str  # "published" or "wanda_fast"
    sequential: str  # "block" or "linear"; of wanda_fast


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    report = measure(options)
    if options.out:
        report = _with_earlier_runs(report, options.out)
    report["rows"] = model_table.rows(report)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(model_table.page(report))
    return 1 if any(row["agreement"] is False for row in report["rows"]) else 0


def measure(options: argparse.Namespace) -> dict:
    """All runs of all rounds, and what they were made with, ready for JSON."""
    config = model_shapes.config_of(options.model, options.shape)
    work = model_shapes.Work.of(config, options.nsamples, options.seqlen)
    jobs, not_run = _jobs(options)
    report = {
        "workload": {
            "model": options.shape or Path(options.model).name,
            "sparsity_type": options.sparsity_type,
            "nsamples": options.nsamples,
            "seqlen": options.seqlen,
            "blocks": work.n_blocks,
            "published_blocks": options.reference_blocks or work.n_blocks,
            "gemm_tokens": options.gemm_tokens,
        },
        "flops": {
            "published": work.flops("published"),
            "block": work.flops("wanda_fast"),
            "linear": work.flops("wanda_fast", "linear"),
        },
        "machine": machine.describe(options.device),
        "not_run": not_run,
        "gemm": [],
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="bench_prune_model") as folder:
        torch.save(_tokens(options, config), Path(folder) / "tokens.pt")
        for index in range(options.rounds):
            _round(options, jobs, Path(folder), index, report)
    return report


def _with_earlier_runs(report: dict, file: Path) -> dict:
    """A machine that is quiet for minutes only is measured bit by bit: runs of the same work are kept."""
    if not file.exists():
        return report
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if earlier["workload"] != report["workload"]:
        raise SystemExit(f"{file} holds runs of other work: {earlier['workload']}")
    before, now = ({name: each["machine"].get(name) for name in SAME_MACHINE} for each in (earlier, report))
    if before != now:
        raise SystemExit(f"{file} holds runs of another machine: {before}; this one is {now}")
    joined = {name: earlier[name] + report[name] for name in ("gemm", "runs")}
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
            if method in METHODS:
                jobs.append(Job(dtype, method, "published", "block"))
            jobs += [Job(dtype, method, "wanda_fast", sequential) for sequential in options.sequential]
    return jobs, not_run


def _tokens(options: argparse.Namespace, config) -> torch.Tensor:
    """The calibration: text through the model's tokenizer where it has one, else random tokens."""
    shape = (options.nsamples, options.seqlen)
    if options.model and (Path(options.model) / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        from wanda_fast.data.calibration import calibration_tokens

        return calibration_tokens(
            options.dataset, AutoTokenizer.from_pretrained(options.model), *shape, 0, None
        )
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
        own.mkdir(exist_ok=True)
        if out and Path(out).exists():
            shutil.rmtree(out)
        found[job] = _run(options, {**vars(job), "masks": str(own / "masks.pt"), "out": out}, folder)
        print(f"round {index + 1}: {vars(job)}: {found[job]['wall']:.2f} s", file=sys.stderr, flush=True)
    for job, result in found.items():
        made_by = {"masks": _agreement(folder, jobs, job), "commit": report["machine"]["commit"]}
        report["runs"].append({**vars(job), **result, **made_by})


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
    parser.add_argument("--out", type=Path, help="JSON file; runs of the same work that it holds are kept")
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
