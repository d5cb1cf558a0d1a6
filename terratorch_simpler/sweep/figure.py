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
QUALITIES = {
    "linear": "accuracy of a linear probe",
    "knn": "accuracy of 5 nearest neighbours",
    "similarity": "similarity with the last block (CKA)",
}


def sweep_figure(rows: Sequence[Row]) -> Figure:
    """Quality over latency and over MACs, a curve for every width; small official models are lines, their cost alone.

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
        x, y = [row[cost] for row in of_width], [row[quality] for row in of_width]
        marker: Any = MARKERS[number % len(MARKERS)]
        ax.plot(x, y, marker, color=CURVE, ms=4, alpha=0.8, label=f"width {width:g}")
        front = _pareto(of_width, quality)
        ax.plot([row[cost] for row in front], [row[quality] for row in front], "-", color=CURVE, lw=1, alpha=0.6)
        for row in of_width:
            ax.annotate(str(row["depth"]), (row[cost], row[quality]), (0, 4), textcoords="offset points", fontsize=7)
        if f"{quality}_low" in rows[0]:
            low, high = ([row[f"{quality}_{end}"] for row in of_width] for end in ("low", "high"))
            ax.vlines(x, low, high, color=CURVE, lw=0.8, alpha=0.4)
    chosen = [row for row in shown if row["chosen_by"]]
    if chosen:
        x, y = [row[cost] for row in chosen], [row[quality] for row in chosen]
        ax.plot(x, y, "o", mfc="none", color=CHOSEN, ms=10, label="chosen by a criterion")
    for number, row in enumerate(row for row in rows if row["kind"] == "control"):
        ax.axvline(row[cost], color=CONTROL, lw=1, ls=("--", ":")[number % 2], label=row["name"])


def _pareto(by_cost: Sequence[Row], quality: str) -> list[Row]:
    """Those that keep more than everything cheaper."""
    front: list[Row] = []
    for row in by_cost:
        if not front or row[quality] > front[-1][quality]:
            front.append(row)
    return front
