"""Tables for the terminal, made from reports."""

from statistics import fmean

from rich.table import Table

from wanda_fast.cli.inspection import Inspection
from wanda_fast.inference.measure import Bench
from wanda_fast.report.contents import RankReport, Report
from wanda_fast.report.expected import expected_rows
from wanda_fast.report.packed_sizes import PackedSizes
from wanda_fast.report.sweep import Sweep
from wanda_fast.report.task_results import beside

# What a sweep's table has of `Report.perplexity`, with the headings.
MEASURED = {"pruned": "perplexity", "ratio": "of dense", "kl": "KL", "flips": "flips"}


def summary_tables(report: Report) -> list[Table]:
    """The results of a run, and its seconds per phase."""
    recipe = report.recipe
    summary = Table(title=f"{recipe['prune_method']}, {recipe['sparsity_type']}", show_header=False)
    if report.linears:
        summary.add_row("sparsity", f"{report.sparsity:.4f} over {len(report.linears)} linears")
        blocks = report.block_sparsity().values()
        summary.add_row("per block", f"{min(blocks):.4f} to {max(blocks):.4f}")
    if errors := report.block_error().values():
        low, high = min(errors), max(errors)
        summary.add_row("error, mean of a block", f"{low:.4f} to {high:.4f} of ||WX||^2")
    reach = report.reach
    share = reach.prunable / max(reach.model, 1)
    summary.add_row("in reach", f"{reach.prunable:,} of the model's {reach.model:,} weights ({share:.1%})")
    if report.calibration:
        nsamples, *sizes = report.calibration["shape"]
        what = f"{nsamples} x {sizes[0]} tokens"
        if len(sizes) > 1:
            what = f"{nsamples} images of {'x'.join(map(str, sizes))}"
            what += ", transform train" if report.calibration.get("transform") == "train" else ""
        if report.calibration.get("bos") is not None:
            what += ", each window beginning with BOS"
        digest = report.calibration["sha256"][:12]
        summary.add_row("calibration", f"{recipe['dataset']}, {what}, sha256 {digest}")
    for which in ("dense", "pruned"):
        if which in report.perplexity:
            summary.add_row(f"perplexity, {which}", f"{report.perplexity[which]:.4f}")
        if which in report.accuracy:
            summary.add_row(f"accuracy, {which}", _shares(report.accuracy[which]))
    if "kl" in report.perplexity:
        summary.add_row("distance to dense", _distance(report.perplexity))
    for measured in filter(None, (report.perplexity, report.accuracy)):
        summary.add_row("measured on", measured["protocol"])
    if "comparable" in report.perplexity:
        summary.add_row("comparable with", report.perplexity["comparable"])
    for name, words in expected_rows(report.expected):
        summary.add_row(name, words)
    if counts := report.expert_tokens().values():
        fewest, starved = min(x["smallest"] for x in counts), sum(x["starved"] for x in counts)
        every = sum(x["experts"] for x in counts)
        summary.add_row("tokens of an expert", f"{fewest:,} or more; {starved} of {every} saw few")
    for task, results in report.zero_shot.items():
        summary.add_row(task, beside(results))
    if report.backends:
        summary.add_row(
            "backends", ", ".join(f"{name} {backend}" for name, backend in report.backends.items())
        )
    for name, value in PackedSizes(**report.packed).rows() if report.packed else ():
        summary.add_row(name, value)
    for sentence in report.warnings:
        summary.add_row("warning", sentence)
    for device, peak in report.peak_memory.items():
        summary.add_row(f"peak memory, {device}", f"{peak / 2**20:,.0f} MiB")
    phases = report.seconds
    if report.ranks:
        summary.add_row("ranks", _ranks_line(report.ranks))
        phases = {name: max(rank.seconds.get(name, 0.0) for rank in report.ranks) for name in phases}
    seconds = Table("phase", "seconds", title="time, slowest rank" if report.ranks else "time")
    for phase, value in phases.items():
        seconds.add_row(phase, f"{value:.2f}")
    seconds.add_row("all", f"{sum(report.seconds.values()):.2f}")
    return [summary, seconds]


def sweep_tables(sweep: Sweep) -> list[Table]:
    """A row for the dense model and one for each setting; what they share; seconds per phase."""
    reports = sweep.reports
    measured = [name for name in MEASURED if any(name in report.perplexity for report in reports.values())]
    errors = {name: report.block_error().values() for name, report in reports.items()}
    columns = ["setting", "sparsity", *(MEASURED[name] for name in measured)]
    table = Table(*columns, *["error"] * any(errors.values()), "seconds", title=sweep.first.recipe["model"])
    if "dense" in sweep.first.perplexity:
        table.add_row("dense", "0", f"{sweep.first.perplexity['dense']:.4f}")
    for name, report in reports.items():
        values = [f"{report.perplexity[each]:.4f}" for each in measured]
        error = [f"{fmean(errors[name]):.4f}" if errors[name] else "-"] * any(errors.values())
        seconds = f"{sum(report.seconds.values()):.2f}"
        table.add_row(name, f"{report.sparsity:.4f}", *values, *error, seconds)
    return [table, _shared_table(sweep)]


def _shared_table(sweep: Sweep) -> Table:
    table, first = Table(title="shared by the settings", show_header=False), sweep.first
    if protocol := first.perplexity.get("protocol"):
        table.add_row("measured on", protocol)
    for sentence in dict.fromkeys(each for report in sweep.reports.values() for each in report.warnings):
        table.add_row("warning", sentence)
    for device, peak in first.peak_memory.items():
        table.add_row(f"peak memory, {device}", f"{peak / 2**20:,.0f} MiB")
    for phase, value in sweep.seconds.items():
        table.add_row(f"{phase}, seconds", f"{value:.2f}")
    table.add_row("all, with the settings' own", f"{sweep.all_seconds:.2f}")
    return table


def _ranks_line(ranks: list[RankReport]) -> str:
    machines = len({rank.host for rank in ranks})
    waited = [rank.seconds.get("collectives", 0.0) for rank in ranks]
    return (
        f"{len(ranks)} on {machines} {'machine' if machines == 1 else 'machines'}; each {min(waited):.1f} to "
        f"{max(waited):.1f} s in collectives, {max(rank.moved for rank in ranks) / 2**20:,.0f} MiB moved"
    )


def error_table(report: Report) -> Table:
    """The reconstruction error of each linear for which it was measured."""
    table = Table("linear", "||(W - W')X||^2", "of ||WX||^2", title="reconstruction error")
    for name, linear in report.linears.items():
        if linear.error is not None:
            table.add_row(name, f"{linear.error:.4g}", f"{linear.relative_error:.4f}")
    return table


def _distance(perplexity: dict) -> str:
    return (
        f"KL {perplexity['kl']:.4f} nats, {perplexity['flips']:.2%} of first choices changed, perplexity x "
        f"{perplexity['ratio']:.3f}"
    )


def _shares(accuracy: dict[str, float]) -> str:
    return f"top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%}"


def measured_line(report: Report) -> str:
    if report.accuracy:
        return f"accuracy {_shares(report.accuracy['dense'])} ({report.accuracy['protocol']})"
    if not report.perplexity:
        return "perplexity: not measured (--dataset none)"
    measured = report.perplexity
    return f"perplexity {measured['dense']:.4f} ({measured['protocol']}; {measured['comparable']})"


def inspection_tables(inspection: Inspection) -> list[Table]:
    """A table with one row per linear, and one of totals."""
    linears = Table(title=inspection.model)
    linears.add_column("linear", overflow="fold")
    for column in ("out x in", "dtype", "sparsity", "patterns"):
        linears.add_column(column, no_wrap=True)
    for linear in inspection.linears:
        shape = f"{linear.shape[0]} x {linear.shape[1]}"
        dtype = str(linear.dtype).removeprefix("torch.")
        linears.add_row(
            linear.name, shape, dtype, f"{linear.sparsity:.4f}", ", ".join(linear.patterns) or "-"
        )
    totals = Table(title="totals", show_header=False)
    totals.add_row("blocks", f"{len(inspection.blocks)}")
    totals.add_row("linears", f"{len(inspection.linears)}")
    totals.add_row("sparsity", f"{inspection.sparsity:.4f}")
    reach = inspection.reach
    share = reach.prunable / max(reach.model, 1)
    totals.add_row("in reach", f"{reach.prunable:,} of the model's {reach.model:,} weights ({share:.1%})")
    return [linears, totals]


def doctor_tables(facts: list[tuple[str, str, str]]) -> list[Table]:
    """One table per section of `wanda_kernels.diagnose`."""
    tables: dict[str, Table] = {}
    for section, name, value in facts:
        tables.setdefault(section, Table(title=section, show_header=False)).add_row(name, value)
    return list(tables.values())


def bench_table(bench: Bench) -> Table:
    """Milliseconds of each product and of all linears, these with their gain over the fastest dense ones."""
    where = "a GPU" if bench.device != "cpu" else f"the CPU, threads: {bench.threads}"
    each_variant = [pair for one in bench.times for pair in one.seconds.items()]
    reasons = dict.fromkeys(f"{name}: {value}" for name, value in each_variant if isinstance(value, str))
    table = Table(title=f"{bench.model}: milliseconds on {where}", caption="; ".join(reasons))
    for column in ("rows", "linears", *bench.times[0].seconds):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for rows in dict.fromkeys(each.rows for each in bench.times):
        for each in (one for one in bench.times if one.rows == rows):
            name = f"{each.count} of {each.shape[0]}x{each.shape[1]}"
            table.add_row(str(rows), name, *map(_milliseconds, each.seconds.values()))
        total = bench.total(rows)
        fastest = min(seconds for name, seconds in total.items() if name.startswith("dense"))
        table.add_row(str(rows), "all", *map(_milliseconds, total.values()))
        gains = ("-" if isinstance(each, str) else f"{fastest / each:.2f}x" for each in total.values())
        table.add_row(str(rows), "gain", *gains, end_section=True)
    return table


def _milliseconds(seconds: float | str) -> str:
    if isinstance(seconds, str):
        return "-"
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"
