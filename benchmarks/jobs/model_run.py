"""One whole job in a process of its own, so that its peak memory is its own.

    python -m benchmarks.jobs.model_run SETTINGS.json RESULT.json

Settings: see `bench_prune_model`. The result: seconds in all and per phase, peak memory; the masks of two
blocks go to a file.
"""

import json
import logging
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.jobs import model_shapes
from benchmarks.jobs.linear_experts import with_linear_experts
from benchmarks.jobs.model_table import PHASES
from benchmarks.jobs.published_pipeline import prune_published
from benchmarks.jobs.stopwatch import Stopwatch
from wanda_fast.memory import prefer_huge_pages
from wanda_fast.model.architecture import find_blocks

ALIASES = {"load": "read", "factor": "selection", "error": "selection"}


def run(settings: dict) -> dict:
    """The job of `settings["pipeline"]`: "published", "wanda_fast", or "gemm" for the rate of matmuls."""
    torch.manual_seed(0)
    if settings["pipeline"] == "wanda_fast":
        prefer_huge_pages()  # as `wanda-fast prune` does
    if settings["pipeline"] == "gemm":
        return _gemm(settings)
    token_ids = torch.load(settings["tokens"])
    job = _published if settings["pipeline"] == "published" else _wanda_fast
    warm_up = settings | {"model": None, "shape": "tiny", "out": None}
    job(_source(warm_up), torch.arange(64).view(2, 32) % 256, warm_up)
    source = _source(settings)
    if isinstance(source, nn.Module):  # kernels of these sizes are loaded, in time that is not counted
        with torch.no_grad():
            source(token_ids[:1].to(source.device))
    if settings["device"] == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began, worked = time.perf_counter(), time.process_time()
    seconds, model = job(source, token_ids, settings)
    wall, worked = time.perf_counter() - began, time.process_time() - worked
    result = {"wall": wall, "cpu_s": worked, "seconds": _phases(seconds, wall)}
    result["peak_bytes"] = _peak(settings["device"])
    torch.save(_zeros(model, settings), settings["masks"])
    return result


def _source(settings: dict) -> str | nn.Module:
    """A checkpoint's folder, or a live model, made in time that is not counted."""
    if settings["model"]:
        return settings["model"]
    dtype = getattr(torch, settings["dtype"])
    return model_shapes.random_model(settings["shape"], dtype, settings["device"])


def _published(source: str | nn.Module, token_ids: torch.Tensor, settings: dict):
    from transformers import AutoModelForCausalLM

    stopwatch = Stopwatch(torch.device(settings["device"]))
    model, dtype = source, getattr(torch, settings["dtype"])
    if isinstance(source, str):
        with stopwatch.phase("read"):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(settings["device"])
    pattern = settings["pattern"] if ":" in settings["pattern"] else "0.5"
    blocks = settings["reference_blocks"]
    model = with_linear_experts(model)
    prune_published(model, token_ids, settings["method"], pattern, stopwatch=stopwatch, n_blocks=blocks)
    if settings["out"]:
        with stopwatch.phase("write"):
            model.save_pretrained(settings["out"])
    return stopwatch.seconds, model


def _wanda_fast(source: str | nn.Module, token_ids: torch.Tensor, settings: dict):
    import wanda_fast

    report = wanda_fast.prune(
        source,
        prune_method=settings["method"],
        sparsity_type=settings["pattern"],
        sequential=settings["sequential"],
        dataset=token_ids,
        seqlen=token_ids.shape[1],
        device=settings["device"],
        dtype=settings["dtype"],
        save_model=settings["out"],
        measure_error=False,  # the published pipeline measures none
    )
    return report.seconds, source if isinstance(source, nn.Module) else settings["out"]


def _phases(seconds: dict[str, float], wall: float) -> dict[str, float]:
    """By the names of `PHASES`; what is left of the wall time is "other"."""
    found = dict.fromkeys(PHASES, 0.0)
    for name, value in seconds.items():
        name = ALIASES.get(name, name)
        if name in found:
            found[name] += value
    return found | {"other": wall - sum(found.values())}


def _zeros(model: str | nn.Module, settings: dict) -> dict[str, torch.Tensor]:
    """Which weights are zero, bool, of the first block and of the last that both pipelines prune."""
    if isinstance(model, str):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    last = (settings["reference_blocks"] or len(find_blocks(model))) - 1
    blocks = find_blocks(model)
    return {
        f"{index}{linear.name.removeprefix(blocks[index].name)}": (linear.weight == 0).cpu()
        for index in sorted({0, last})
        for linear in blocks[index].linears
    }


def _peak(device: str) -> int:
    """Bytes: allocated on the GPU, or resident, Python and torch included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gemm(settings: dict) -> dict:
    config = model_shapes.config_of(settings["model"], settings["shape"])
    work = model_shapes.Work.of(config, settings["nsamples"], settings["seqlen"])
    dtype, device = getattr(torch, settings["dtype"]), settings["device"]
    return {"flops_per_s": model_shapes.gemm_rate(work, dtype, device, settings["gemm_tokens"])}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    result = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
