"""Accuracy by depth as a picture, from the results of a study."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from terratorch_simpler.files import whole_file

Rows = list[Mapping[str, str]]
MARKERS = {"simpler": "o", "knee": "s", "block_influence": "^", "angular": "D", "cka_intervals": "v"}


def draw(results: Path, picture: Path) -> None:
    """Draw every encoder that was cut to several depths, one panel for each and its set-up.

    Args:
        results: ``results.csv``.
        picture: The PNG to write; none is written as long as there is no such encoder.
    """
    with results.open() as file:
        panels = dict(_panels(list(csv.DictReader(file))))
    if not panels:
        return
    figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, ((setup, encoder), rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _panel(axes, rows)
        axes.set(title=f"{setup}, {encoder}", xlabel="kept blocks", ylabel="test mIoU")
        axes.legend(fontsize=8, loc="lower right")
    with whole_file(picture) as part:
        figure.savefig(part, format="png", dpi=120, metadata={"Software": None})


def _panels(rows: Rows) -> Iterator[tuple[tuple[str, str], Rows]]:
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in rows:
        groups[row["setup"], row["encoder"]].append(row)
    for key, group in groups.items():
        if len(_by_depth(group, "depth")) > 1:
            yield key, group


def _panel(axes: Axes, rows: Rows) -> None:
    looks = {"depth": ("#1b4965", "pretrained, first blocks"), "random": ("#9aa7b3", "random weights, first blocks")}
    for variant, (color, label) in looks.items():
        scores = _by_depth(rows, variant)
        if not scores:
            continue
        means = [statistics.mean(values) for values in scores.values()]
        errors = [_error(values) for values in scores.values()]
        axes.errorbar(list(scores), means, errors, color=color, label=label, marker=".", capsize=2, linewidth=1.5)
    chosen: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["variant"] == "rule":
            chosen[row["rule"], len(row["kept"].split())].append(float(row["test_miou"]))
    for rule, marker in MARKERS.items():
        points = {count: statistics.mean(values) for (name, count), values in chosen.items() if name == rule}
        if points:
            counts, means = list(points), list(points.values())
            axes.scatter(counts, means, marker=marker, s=42, facecolor="none", edgecolor="#c2371f", label=rule, zorder=3)
    axes.grid(color="#d6dde4", linewidth=0.6)


def _by_depth(rows: Rows, variant: str) -> dict[int, list[float]]:
    """Scores of the seeds, by the first blocks that are kept at full width."""
    scores: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["variant"] == variant:
            scores[int(row["depth"])].append(float(row["test_miou"]))
    return dict(sorted(scores.items()))


def _error(values: list[float]) -> float:
    """Standard error over seeds."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
