"""A GPU run as one page: conditions, steps, the operations' headline workloads, whole jobs."""

from benchmarks.core import machine, results, tables
from benchmarks.core.providers import OURS
from benchmarks.core.rows import FAILED
from benchmarks.jobs import model_table
from tools.gpu.steps import GpuRun


def write(run: GpuRun) -> None:
    results.replace_file(run.out / "run.md", whole(run))


def whole(run: GpuRun) -> str:
    warning = tables.warning(run.facts, False)
    parts = ["# A GPU run", *([f"**{warning}**"] if warning else []), machine.sentence(run.facts)]
    parts += ["## Steps", steps_table(run), "## Operations"]
    if (run.out / results.TABLE).exists():
        rows = [row for row in results.read(run.out).rows if row.operation != "dispatch"]
        shown = [row for row in rows if (row.headline and row.provider in OURS) or row.status == FAILED]
        parts.append(tables.markdown(tables.COLUMNS, map(tables.cells, shown)))
    else:
        parts.append("Not measured.")
    parts.append("## Whole jobs")
    reports = [model_table.read(path) for path in sorted(run.out.glob("job-*.json"))]
    for report in reports:
        parts += [f"### {model_table.title(report)}", model_table.page(report).strip()]
    return "\n\n".join(parts if reports else [*parts, "Not measured."]) + "\n"


def steps_table(run: GpuRun) -> str:
    lines = [
        (
            each["name"],
            f"{each['seconds']:.0f} s",
            "**FAILED**" if each["problems"] else "ok",
            "; ".join(each["problems"]),
        )
        for each in run.steps
    ]
    return tables.markdown(("step", "time", "result", "problems"), lines)
