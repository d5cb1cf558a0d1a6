"""Accuracy by depth, beside that of the intact encoder, as a picture from the results of a study."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.study.runs import standard_error
from terratorch_simpler.files import atomic_write

Rows = list[Mapping[str, str]]
LINES = (("depth", "#1b4965", "pretrained, first blocks"), ("random", "#9aa7b3", "random weights, first blocks"))
MARKERS = {"simpler": "o", "knee": "s", "block_influence": "^", "angular": "D", "cka_intervals": "v"}


def draw(results: Path, picture: Path) -> None:
    """Write the picture as a PNG; none is written as long as no encoder was cut to several depths.

    Args:
        results: ``results.csv``.
        picture: The PNG.
    """
    with results.open() as file:
        drawn = figure(list(csv.DictReader(file)))
    if drawn.axes:
        with atomic_write(picture) as part:
            drawn.savefig(part, format="png", dpi=120, metadata={"Software": None})


def figure(rows: Rows) -> Figure:
    """One panel for each set-up and encoder that was cut to several depths.

    Args:
        rows: Lines of ``results.csv``.
    """
    panels = dict(_panels(rows))
    lines = math.ceil(len(panels) / 2)
    drawn = Figure(figsize=(6 * min(2, len(panels)) or 6, 4.2 * lines or 4.2), layout="constrained")
    FigureCanvasAgg(drawn)
    for place, ((setup, encoder), group) in enumerate(panels.items(), 1):
        axes = drawn.add_subplot(lines, min(2, len(panels)), place)
        _panel(axes, group)
        axes.set(title=f"{setup}, {encoder}", xlabel="kept blocks", ylabel="test mIoU less that of full depth")
    looks = {label: handle for axes in drawn.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(looks.values(), looks.keys(), loc="outside lower center", ncols=4, fontsize=9)
    return drawn


def _panels(rows: Rows) -> Iterator[tuple[tuple[str, str], Rows]]:
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in rows:
        groups[row["setup"], row["encoder"]].append(row)
    for key, group in groups.items():
        if len({row["depth"] for row in group if row["variant"] == "depth"}) > 1:
            yield key, group


def _panel(axes: Axes, rows: Rows) -> None:
    """Differences to the intact pretrained encoder, seed by seed: what labels of a seed do to all of them takes no part."""
    full = max(int(row["depth"]) for row in rows if row["variant"] == "depth")
    whole = {row["seed"]: float(row["test_miou"]) for row in rows if row["variant"] == "depth" and int(row["depth"]) == full}
    gains: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["variant"] in ("depth", "random", "rule") and row["seed"] in whole:
            name = row["rule"] if row["variant"] == "rule" else row["variant"]
            gains[name, len(row["kept"].split())].append(float(row["test_miou"]) - whole[row["seed"]])
    axes.axhline(0, color="#9aa7b3", linewidth=0.8)
    for name, color, label in LINES:
        depths = sorted(count for found, count in gains if found == name)
        means = [statistics.mean(gains[name, depth]) for depth in depths]
        errors = [standard_error(gains[name, depth]) if len(gains[name, depth]) > 1 else 0.0 for depth in depths]
        axes.errorbar(depths, means, errors, color=color, label=label, marker=".", capsize=2, linewidth=1.5)
    for rule, marker in MARKERS.items():
        points = {count: statistics.mean(values) for (name, count), values in gains.items() if name == rule}
        size = 150 if rule == "simpler" else 46  # around the others, which often agree
        look = {"marker": marker, "s": size, "facecolor": "none", "edgecolor": "#c2371f"}
        axes.scatter(list(points), list(points.values()), label=rule, zorder=3, **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#d6dde4", linewidth=0.6)
