"""Tables for the terminal, made from reports."""

from rich.table import Table

from wanda_fast.cli.inspection import Inspection
from wanda_fast.report.contents import RankReport, Report
from wanda_fast.report.task_results import beside


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
        digest = report.calibration["sha256"][:12]
        summary.add_row("calibration", f"{recipe['dataset']}, {what}, sha256 {digest}")
    for which in ("dense", "pruned"):
        if which in report.perplexity:
            summary.add_row(f"perplexity, {which}", f"{report.perplexity[which]:.4f}")
        if which in report.accuracy:
            summary.add_row(f"accuracy, {which}", _shares(report.accuracy[which]))
    for measured in filter(None, (report.perplexity, report.accuracy)):
        summary.add_row("measured on", measured["protocol"])
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


def _shares(accuracy: dict[str, float]) -> str:
    return f"top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%}"


def measured_line(report: Report) -> str:
    if report.accuracy:
        return f"accuracy {_shares(report.accuracy['dense'])} ({report.accuracy['protocol']})"
    if not report.perplexity:
        return "perplexity: not measured (--dataset none)"
    return f"perplexity {report.perplexity['dense']:.4f} ({report.perplexity['protocol']})"


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
