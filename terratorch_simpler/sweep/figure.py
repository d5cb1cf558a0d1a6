"""A sweep as one figure: what is kept over what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from terratorch_simpler.report.figure import CHOSEN, CURVE
from terratorch_simpler.sweep.rows import Row

CONTROL = "#8d99ae"
MARKERS = "os^Dv"
COLOURS = (CURVE, "#2a9d8f", "#e09f3e", "#7b5ea7", "#6c757d")
QUALITIES = {
    "linear": "accuracy of a linear probe",
    "knn": "accuracy of 5 nearest neighbours",
    "similarity": "similarity with the last block (CKA)",
}


def sweep_figure(rows: Sequence[Row]) -> Figure:
    """Quality over latency and over MACs, a curve for every width, with the depths that nothing cheaper equals.

    Small official models are upright lines: their cost alone is known.

    Args:
        rows: Lines of a sweep.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # no window system needed, and pyplot's global state stays untouched
    quality = next((key for key in QUALITIES if any(row[key] is not None for row in rows)), "similarity")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, cost, label in zip(
        axes, ("latency_ms", "macs"), ("milliseconds for one tile", "MACs for one tile"), strict=True
    ):
        _draw(ax, rows, cost, quality)
        ax.set(xlabel=label, ylabel=QUALITIES[quality] if ax is axes[0] else "")
        ax.grid(alpha=0.3)
    figure.suptitle(f"{rows[0]['name']}: what every cut costs and keeps", fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _draw(ax: Axes, rows: Sequence[Row], cost: str, quality: str) -> None:
    shown = [row for row in rows if row["kind"] == "slimmed" and row[quality] is not None]
    for number, width in enumerate(sorted({row["width"] for row in shown}, reverse=True)):
        of_width = sorted((row for row in shown if row["width"] == width), key=lambda row: row[cost])
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "zorder": 3}
        x, y = [row[cost] for row in of_width], [row[quality] for row in of_width]
        ax.plot(x, y, MARKERS[number % len(MARKERS)], ms=4, label=f"width {width:g}", **style)
        front = _pareto(of_width, quality)
        ax.plot([row[cost] for row in front], [row[quality] for row in front], "-", lw=1.2, **style)
        for row in front:
            ax.annotate(str(row["depth"]), (row[cost], row[quality]), (0, 5), textcoords="offset points", fontsize=8)
        if number == 0 and f"{quality}_low" in rows[0]:  # those of other widths are about as wide
            low, high = ([row[f"{quality}_{end}"] for row in of_width] for end in ("low", "high"))
            ax.fill_between(x, low, high, color=style["color"], alpha=0.1, lw=0, label="95 % interval")
    chosen = [row for row in shown if row["chosen_by"]]
    if chosen:
        x, y = [row[cost] for row in chosen], [row[quality] for row in chosen]
        ax.plot(x, y, "o", mfc="none", color=CHOSEN, ms=10, zorder=4, label="chosen by a criterion")
    for number, row in enumerate(row for row in rows if row["kind"] == "control"):
        ax.axvline(row[cost], color=CONTROL, lw=1, ls=("--", ":")[number % 2], label=row["name"])
    ax.set_xscale("log")


def _pareto(by_cost: Sequence[Row], quality: str) -> list[Row]:
    """Those that keep more than everything cheaper."""
    front: list[Row] = []
    for row in by_cost:
        if not front or row[quality] > front[-1][quality]:
            front.append(row)
    return front
