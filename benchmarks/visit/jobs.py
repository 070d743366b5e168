"""The whole job: `benchmarks.bench_prune_model` on shapes of real models, one method and pattern a call."""

import json
from itertools import product

from benchmarks.visit.commands import run
from benchmarks.visit.state import Visit

MODULE = "benchmarks.bench_prune_model"
JOB_S = 150  # at most, of one call
METHODS = ("wanda", "connect", "sparsegpt")
# in order of worth: the goals are set for Llama-2-7B's shape and 2:4
SETTINGS = (
    ("llama2-7b", "2:4"),
    ("llama2-7b", "unstructured"),
    ("llama3-8b", "2:4"),
    ("llama3-8b", "unstructured"),
)


def names(rehearsal: bool) -> list[str]:
    """SHAPE/PATTERN/METHOD of every job."""
    settings = (("tiny", "2:4"),) if rehearsal else SETTINGS
    methods = METHODS[:1] if rehearsal else METHODS
    return [f"{shape}/{pattern}/{method}" for (shape, pattern), method in product(settings, methods)]


def measure(visit: Visit, name: str) -> str:
    """The report of one job, into `data["jobs"]`; why there is none, empty where there is."""
    shape, pattern, method = name.split("/")
    out = visit.work / f"{name.replace('/', '-').replace(':', 'of')}.json"
    out.unlink(missing_ok=True)
    arguments = ["--device", visit.device, "--shape", shape, "--methods", method, "--sparsity-type", pattern]
    arguments += ["--rounds", 1, "--reference-blocks", 1, "--out", out, "--sequential"]
    if visit.rehearsal:
        arguments += ["block", "--nsamples", 2, "--seqlen", 32, "--dtype", "float32"]
    else:
        arguments += ["block,linear"]
    ended = run(visit.command(f"job:{name}", MODULE, *arguments, limit_s=visit.within(JOB_S)))
    if not out.exists():
        return ended.why() or "no report was written"
    report = json.loads(out.read_text())
    if not report["runs"]:
        return "; ".join(f"{what}: {reason}" for what, reason in report["not_run"].items())
    visit.data["jobs"][name] = report
    return ended.why()
