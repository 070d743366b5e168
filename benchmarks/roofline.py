"""The roofline of one machine: every provider's headline rates under the measured roofs, as an SVG."""

from pathlib import Path

from benchmarks.providers import OURS, PUBLISHED, TORCH
from benchmarks.roofs import Roofs
from benchmarks.rows import Row

COLOURS = {
    PUBLISHED: "tab:gray",
    TORCH: "tab:orange",
    "triton": "tab:blue",
    "cuda": "tab:green",
    "cpu": "tab:blue",
}
MARKERS = "osD^vPX*<>"


def plot(path: Path, rows: list[Row], roofs: Roofs, title: str) -> str:
    """Write the plot to `path`; why it was not, empty where it was."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed (pip install 'wanda_fast[bench]')"
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "wanda_fast"  # the same figures, the same file
    from matplotlib import pyplot

    shown = [row for row in rows if row.headline and row.tflop_s and row.provider in COLOURS]
    if not shown:
        return "no row to show"
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    _roofs(axes, roofs, [row.flops_per_byte for row in shown])
    _points(axes, shown)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte (one a weight for selections)", ylabel="TFLOP/s")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return ""


def _roofs(axes, roofs: Roofs, intensities: list[float]) -> None:
    ridge = roofs.flops_per_s / roofs.bytes_per_s
    low, high = min(*intensities, ridge) / 4, max(*intensities, ridge) * 4
    flat = roofs.flops_per_s / 1e12
    label = f"{roofs.bytes_per_s / 1e9:,.3g} GB/s, {flat:,.3g} TFLOP/s, measured"
    axes.plot([low, ridge, high], [roofs.bytes_per_s * low / 1e12, flat, flat], "k-", label=label)


def _points(axes, rows: list[Row]) -> None:
    operations = list(dict.fromkeys(row.operation for row in rows))
    named = set()
    for row in rows:
        name = f"{row.operation} {row.provider}"
        axes.plot(
            row.flops_per_byte,
            row.tflop_s,
            MARKERS[operations.index(row.operation) % len(MARKERS)],
            color=COLOURS[row.provider],
            markerfacecolor=COLOURS[row.provider] if row.provider in OURS else "none",
            label=name if name not in named else None,
        )
        named.add(name)
