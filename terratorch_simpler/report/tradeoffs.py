"""What a sweep has measured: quality over cost, probes by depth, width, recovery, and the rows of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary
from terratorch_simpler.report.charts import STYLE, Point, draw_series, new_figure, tip, to_svg
from terratorch_simpler.report.palette import CHOSEN, CONTROL, CURVE, INK, SECOND, SERIES, SOFT

Row = Mapping[str, Any]

COSTS = {
    "parameters": ("Parameters", "parameters in millions", 1e6),
    "macs": ("MACs", "MACs per tile in billions", 1e9),
    "latency_ms": ("Latency", "milliseconds for one tile", 1.0),
}
"""Column: what it is, the label of its axis, and the unit of that."""
QUALITY = {
    "linear": "accuracy of a linear probe",
    "knn": "accuracy of nearest neighbours",
    "similarity": "CKA to the last block",
}
"""Quality of a pruned encoder, the most informative measure first."""
MEANING = {
    "linear": "accuracy of a linear probe on frozen features, before fine-tuning",
    "knn": "accuracy of nearest neighbours among frozen features, before fine-tuning",
    "similarity": "how alike the features are to those of the last block (CKA), not how accurate the encoder is",
}
"""What a point of a trade-off says, for each measure."""
SPREAD = 4
"""Ratio of the largest cost to that of the dearest pruned encoder above which the axis is logarithmic."""
MOST_LINES = 5
SIDES = np.array([(-1, 1), (1, -1), (1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)])
"""Where the depth of a point may stand, in order: at its corners, which intervals leave free, beside it, above and below."""
FAR = [
    radius * np.array((np.cos(angle), np.sin(angle)))
    for radius in (20, 30, 45, 65)
    for angle in np.radians((45, 135, 225, 315, 20, 160, 200, 340, 70, 110, 250, 290))
]
"""Where it may stand, in points, if there is no room beside the point: with a line that leads to it."""
LEADER = {"arrowstyle": "-", "lw": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2}
WIDTH_MARKERS = {"o": "dots", "s": "squares", "^": "triangles", "v": "turned triangles", "P": "crosses", "*": "stars"}
PROBES = {"linear": ("linear", CURVE, "-"), "knn": ("k-NN", SECOND, "--")}
TABLE_COLUMNS = {
    "depth": ("depth", "d"),
    "width": ("width", "g"),
    "chosen_by": ("chosen by", "words"),
    "parameters": ("parameters", "short"),
    "macs": ("MACs", "short"),
    "latency_ms": ("latency, ms", ".2f"),
    "throughput": ("tiles per s", ".1f"),
    "batch_size": ("at batch size", "d"),
    "peak_memory_mib": ("peak memory, MiB", ".0f"),
    "similarity": ("CKA to the last block", ".3f"),
    "recovery_r2": ("recovery R²", ".3f"),
    "linear": ("linear probe", ".3f"),
    "knn": ("k-NN", ".3f"),
    "linear_recovered": ("linear, recovered", ".3f"),
    "knn_recovered": ("k-NN, recovered", ".3f"),
}
BLOCK_COLUMNS = {
    "block": ("block", "d"),
    "explained_variance": ("variance in the first direction", ".3f"),
    "effective_dimension": ("effective dimension", ".1f"),
    "feature_correlation": ("mean correlation of features", ".3f"),
}


class Card(NamedTuple):
    """One chart of the page.

    Attributes:
        title: Heading.
        words: Pairs of a colour key (a class of page.css, or "") and a sentence.
        svg: The chart.
    """

    title: str
    words: list[tuple[str, str]]
    svg: str


def trade_off_words(quality: str) -> str:
    """The sentence that says what a trade-off shows.

    Args:
        quality: A column of :data:`QUALITY`.
    """
    return f"Each point is an encoder with its depth, upper left is better; it shows {MEANING[quality]}."


def sweep_figure(rows: Sequence[Row]) -> Figure:
    """Quality over latency and over MACs, with a curve of the best encoders of every width.

    Args:
        rows: Rows of a sweep.
    """
    quality = _quality(rows) or "similarity"
    with mpl.rc_context(STYLE):
        figure = new_figure((12, 5.6))
        axes = figure.subplots(1, 2, sharey=True)
        for ax, cost in zip(axes, ("latency_ms", "macs"), strict=True):
            draw_trade_off(ax, rows, cost, quality, label_size=8)
    name = summary.printable(rows[0]["name"])
    figure.suptitle(f"{name}: {QUALITY[quality]} over cost\n{trade_off_words(quality)}", fontsize=11, parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def draw_trade_off(
    axes: Axes, rows: Sequence[Row], cost: str, quality: str, plan: SlimmingPlan | None = None, label_size: float = 9
) -> None:
    """Quality over cost, one marker per width, with the Pareto front; encoders of unknown quality are upright lines.

    Args:
        axes: Where to draw.
        rows: Rows of a sweep.
        cost: A column of :data:`COSTS`.
        quality: A column of :data:`QUALITY`.
        plan: The plan whose encoder gets a ring; without it those that a criterion has chosen get one.
        label_size: Size of the depths at the points, in points.
    """
    _, label, unit = COSTS[cost]
    known = [
        (row, x / unit, y)
        for row in rows
        if (x := _value(row, cost)) is not None and (y := _value(row, quality)) is not None
    ]
    pruned = [entry for entry in known if entry[0].get("kind") != "control"]

    def value(row: Row) -> str:
        amount = f"{_name(row)}\n{_cost(row, cost)}"
        if (y := _value(row, quality)) is None:
            return f"{amount}\nquality not measured"
        return f"{amount}\n{QUALITY[quality]}: {summary.score(y)}{_interval(row, quality)}"

    fronts, others = [], []
    for number, width in enumerate(_all_widths(rows)):
        entries = sorted((e for e in pruned if (_value(e[0], "width") or 1.0) == width), key=lambda e: (e[1], -e[2]))
        color, marker = SERIES[number % len(SERIES)], list(WIDTH_MARKERS)[number % len(WIDTH_MARKERS)]
        axes.plot([], [], marker, color=color, ms=5, label=f"width {width:g}")
        for hollow in (False, True):
            points = [
                Point(x, y, value(row), *_ends(row, quality))
                for row, x, y in entries
                if summary.is_prefix(_kept(row)) != hollow
            ]
            draw_series(axes, points, "", marker, hollow, color=color)
        front = _pareto_front(entries)
        axes.plot([x for _, x, _ in front], [y for _, _, y in front], "--", color=color, lw=1)
        if number == 0 or plan is None:  # a small chart has room for one width
            fronts += [(entry, color) for entry in front]
            others += [(entry, color) for entry in entries if entry not in front]
    if any(None not in _ends(row, quality) for row, _, _ in pruned):
        axes.plot([], [], color=SOFT, lw=1, label="95 % interval")
    ringed = [e for e in pruned if (_is_plan(plan, e[0]) if plan is not None else e[0].get("chosen_by"))]
    if ringed:
        style: dict[str, Any] = {"ls": "", "mfc": "none", "color": CHOSEN, "mew": 1.8, "ms": 11}
        style["label"] = "the plan" if plan is not None else "chosen by a criterion"
        axes.plot([x for _, x, _ in ringed], [y for _, _, y in ringed], "o", **style)
    for number, row in enumerate(row for row in rows if row.get("kind") == "control" and _value(row, cost) is not None):
        x = float(row[cost]) / unit
        tip(_draw_control(axes, row, x, _value(row, quality), number), "control", value(row))
        if plan is not None:  # in the page, which has no legend
            high = (
                x < 0.2 * max(float(each[cost]) for each in rows if _value(each, cost) is not None) / unit
            )  # above the rise
            style = {
                "rotation": 90,
                "ha": "left",
                "va": "top" if high else "bottom",
                "color": CONTROL,
                "fontsize": 9,
                "parse_math": False,
            }
            name = summary.printable(row.get("name", ""), 28)
            axes.annotate(name, (x, 0.98 if high else 0.02), (2, 0), ("data", "axes fraction"), "offset points", **style)
    deepest = max((e for e in pruned if _is_whole(e[0])), key=lambda e: len(_kept(e[0])), default=None)
    if deepest is not None:
        axes.axhline(deepest[2], color=SOFT, lw=1, ls=":", zorder=1, label=f"{len(_kept(deepest[0]))} blocks")
    _scale_cost(axes, [x / unit for row in rows if (x := _value(row, cost)) is not None], [x for _, x, _ in pruned])
    axes.set(xlabel=label, ylabel=QUALITY[quality])
    axes.margins(y=0.12)
    axes.grid(axis="y")
    _label_depths(axes, sorted([*fronts, *others], key=lambda entry: entry[0] not in ringed), label_size)


def _draw_control(axes: Axes, row: Row, x: float, y: float | None, number: int) -> Line2D:
    """Another official encoder, with its name for a legend."""
    name = summary.printable(row.get("name", ""), 40)
    label = name.replace("$", r"\$").lstrip("_")
    if y is None:
        return axes.axvline(x, color=CONTROL, lw=1.5, ls=("--", ":", "-.")[number % 3], label=label)
    return axes.plot([x], [y], "D", color=CONTROL, ms=6, label=label)[0]


def _scale_cost(axes: Axes, amounts: Sequence[float], pruned: Sequence[float]) -> None:
    """From 0, or logarithmic: a control may be a hundred times as large, and would push all others together."""
    if pruned and min(amounts) > 0 and max(amounts) > SPREAD * max(pruned):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)


def _label_depths(axes: Axes, entries: Sequence[tuple[tuple[Row, float, float], str]], size: float) -> None:
    """Depth of every encoder at its point, in its colour, or at the end of a line where points are close together."""
    if not entries:
        return
    axes.autoscale_view()
    frame = axes.get_window_extent()
    points_per_pixel = 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    to_frame = axes.transScale + axes.transLimits
    extent = np.array((frame.width, frame.height)) * points_per_pixel
    places = to_frame.transform([entry[1:] for entry, _ in entries]) * extent
    taken = np.empty((0, 2))
    for ((row, x, y), color), place in zip(entries, places, strict=True):
        text = summary.printable(row.get("depth", ""), 20)
        half = np.array([0.32 * size * len(text), 0.45 * size])
        near = [side * (half + (2 if side.all() else 4)) for side in SIDES]
        for offset, line in [*((each, None) for each in near), *((each, {**LEADER, "color": color}) for each in FAR)]:
            centre = place + offset
            inside = np.all((half <= centre) & (centre <= extent - half))
            covered = [*(np.abs(taken - centre) < 2 * half), *(np.abs(places - centre) < half + 1.5)]
            if inside and not np.all(covered, axis=1).any():
                taken = np.vstack([taken, centre])
                style: dict[str, Any] = {"fontsize": size, "ha": "center", "va": "center", "color": color}
                style |= {"textcoords": "offset points", "parse_math": False, "arrowprops": line}
                axes.annotate(text, (x, y), tuple(offset), **style)
                break


def _all_widths(rows: Sequence[Row]) -> list[float]:
    return sorted({_value(row, "width") or 1.0 for row in rows if row.get("kind") != "control"}, reverse=True)


def cards(plan: SlimmingPlan, rows: Sequence[Row]) -> list[Card]:
    """Charts of what was measured, as far as it was.

    Args:
        plan: The plan of the same encoder.
        rows: Rows of a sweep.
    """
    made = [*_trade_offs(plan, rows), _probes(rows), _widths(plan, rows), _recovery(rows), _gains(rows)]
    return [card for card in made if card is not None]


def table(plan: SlimmingPlan, rows: Sequence[Row]) -> dict[str, Any]:
    """Heading and rows of the table of a sweep; columns without any value are left out.

    Args:
        plan: The plan of the same encoder; its row is marked.
        rows: Rows of a sweep.
    """
    shown = {key: column for key, column in TABLE_COLUMNS.items() if any(row.get(key) not in (None, "") for row in rows)}
    return {
        "head": [(name, kind == "words") for name, kind in shown.values()],
        "rows": [
            {
                "name": _blocks(row)
                if row.get("name") == plan.backbone and row.get("kind") != "control"
                else summary.printable(row.get("name", "")),
                "depth": len(_kept(row)) if row.get("kind") != "control" and _is_whole(row) else None,
                "cells": [(_cell(row, key, kind), kind == "words") for key, (_, kind) in shown.items()],
                "picked": _is_plan(plan, row),
            }
            for row in rows
        ],
    }


def block_table(blocks: Sequence[Row]) -> dict[str, Any]:
    """Heading and rows of the table of blocks.

    Args:
        blocks: Rows of blocks.csv.
    """
    rows = [[_cell(row, key, kind) for key, (_, kind) in BLOCK_COLUMNS.items()] for row in blocks]
    return {"head": [name for name, _ in BLOCK_COLUMNS.values()], "rows": rows}


def _card(title: str, words: list[tuple[str, str]], label: str, draw: Callable[[Axes], object]) -> Card:
    with mpl.rc_context({**STYLE, "axes.spines.right": False}):
        figure = new_figure()
        draw(figure.subplots())
    return Card(title, words, to_svg(figure, label))


def _quality(rows: Sequence[Row]) -> str | None:
    return next((key for key in QUALITY if any(_value(row, key) is not None for row in rows)), None)


def _trade_offs(plan: SlimmingPlan, rows: Sequence[Row]) -> list[Card]:
    quality = _quality(rows)
    if quality is None:
        return []
    words = [("", trade_off_words(quality))]
    pruned = [row for row in rows if row.get("kind") != "control"]
    if not all(summary.is_prefix(_kept(row)) for row in pruned):
        words.append(("", "Hollow: blocks dropped from inside."))
    if len(widths := _all_widths(rows)) > 1:
        shapes = zip(WIDTH_MARKERS.values(), widths, strict=False)
        words.append(("", f"Width: {', '.join(f'{shape} {width:g}' for shape, width in shapes)}."))
    if any(row.get("kind") == "control" for row in rows):
        words.append(("control", "other official encoders; an upright line where only the cost is known."))
    words.append(("", "Dashed: no encoder of that width is better in both. Dotted: the most blocks. The ring is the plan."))
    goal = "CKA" if quality == "similarity" else "accuracy"
    return [
        _card(
            f"{title} against {goal}", words, f"{QUALITY[quality]} over {label}",
            partial(draw_trade_off, rows=rows, cost=cost, quality=quality, plan=plan),
        )
        for cost, (title, label, _) in COSTS.items()
        if any(_value(row, cost) is not None and _value(row, quality) is not None for row in rows)
    ]  # fmt: skip


def _cost(row: Row, cost: str) -> str:
    value = float(row[cost])
    if cost == "latency_ms":
        return f"{value:.2f} ms for one tile"
    return f"{summary.short(value)} {'parameters' if cost == 'parameters' else 'MACs'}"


def _pareto_front(entries: Sequence[tuple[Row, float, float]]) -> list[tuple[Row, float, float]]:
    """Entries sorted by cost of which no cheaper one is at least as good."""
    front: list[tuple[Row, float, float]] = []
    for entry in entries:
        if not front or entry[2] > front[-1][2]:
            front.append(entry)
    return front


def _probes(rows: Sequence[Row]) -> Card | None:
    prefixes = _first_blocks(rows)
    if not any(_points(prefixes, key, "") for key in PROBES):
        return None
    recovered = any(_points(prefixes, f"{key}_recovered", "") for key in PROBES)

    def draw(axes: Axes) -> None:
        for key, (name, color, line) in PROBES.items():
            draw_series(axes, _points(prefixes, key, f"{name} probe"), line, color=color)
            draw_series(
                axes, _points(prefixes, f"{key}_recovered", f"{name} probe with recovery"), "", hollow=True, color=color
            )
        _by_depth(axes, "accuracy of a probe")

    words = [("curve", "linear;"), ("second", "k-NN, dashed."), ("", "Upright lines are 95 % intervals over images.")]
    if recovered:
        words.append(("", "Hollow dots: with linear recovery, no training."))
    return _card("Accuracy by depth", words, "Accuracy of probes by depth", draw)


def _widths(plan: SlimmingPlan, rows: Sequence[Row]) -> Card | None:
    quality = next(
        (key for key in QUALITY if any(_value(r, key) is not None and _value(r, "width") != 1.0 for r in rows)), None
    )
    lines: dict[str, list[Point]] = {}
    for row in rows:
        width, y = _value(row, "width"), None if quality is None else _value(row, quality)
        if width is not None and y is not None and row.get("kind") != "control":
            text = f"{_name(row)}\n{summary.score(y)}{_interval(row, str(quality))}"
            lines.setdefault(str(row.get("kept")), []).append(Point(width, y, text, *_ends(row, str(quality))))
    lines = {kept: sorted(points) for kept, points in lines.items() if len({point.x for point in points}) > 1}
    if quality is None or not lines:
        return None
    step, own = -(-len(lines) // MOST_LINES), " ".join(map(str, plan.kept_blocks))
    shown = {kept: points for number, (kept, points) in enumerate(lines.items()) if kept == own or number % step == 0}

    def draw(axes: Axes) -> None:
        for kept, points in shown.items():
            draw_series(axes, points, color=CHOSEN if kept == own else CURVE)
            axes.annotate(
                str(len(kept.split())),
                points[0][:2],
                (-8, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color=INK,
            )
        axes.set(xlabel="width kept, as a share", ylabel=QUALITY[quality], xlim=(0, 1.04))
        axes.grid(axis="y")

    words = "Share of attention and MLP kept in every block; numbers are depths, the other colour is the plan's."
    return _card("Quality by width", [("", words)], "Quality by width", draw)


def _recovery(rows: Sequence[Row]) -> Card | None:
    points = _points(_first_blocks(rows), "recovery_r2", "R²")
    if not points:
        return None

    def draw(axes: Axes) -> None:
        draw_series(axes, points)
        axes.axhline(1.0, color=SOFT, lw=0.8)
        _by_depth(axes, "R², share of variance")

    words = "Share of the last block's output that a linear map restores; 1 is all."
    return _card("Recovery without training", [("", words)], "R² of linear recovery by depth", draw)


def _gains(rows: Sequence[Row]) -> Card | None:
    bars = []
    for place, (key, (name, color, _)) in enumerate(PROBES.items()):
        for row in _first_blocks(rows):
            depth, gain = _value(row, "depth"), _value(row, f"{key}_gain")
            if depth is not None and gain is not None:
                low, high = _ends(row, f"{key}_gain")
                spread = "" if low is None or high is None else f" ({low:+.3f} to {high:+.3f})"
                text = f"depth {depth:g}, {name}: {gain:+.3f}{spread}"
                bars.append((Point(depth + (place - 0.5) * 0.4, gain, text, low, high), color))
    if not bars:
        return None

    def draw(axes: Axes) -> None:
        for bar, color in bars:
            tip(axes.bar([bar.x], [bar.y], 0.36, color=color)[0], "bar", bar.text)
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.x, bar.x], [bar.low, bar.high], color=INK, lw=1.2)
        axes.axhline(0.0, color=SOFT, lw=0.8)
        _by_depth(axes, "accuracy gained")

    words = [
        ("curve", "linear;"),
        ("second", "k-NN."),
        ("", "Accuracy with recovery less that without, on the same images; upright lines are 95 % intervals over images."),
    ]
    return _card("What recovery gains", words, "Accuracy gained by recovery, by depth", draw)


def _by_depth(axes: Axes, label: str) -> None:
    axes.set(xlabel="depth: first blocks kept", ylabel=label)
    axes.set_xlim(left=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))
    axes.grid(axis="y")


def _cell(row: Row, key: str, how: str) -> str:
    if how == "words":
        return summary.printable(row.get(key) or "")
    value = _value(row, key)
    if value is None or how == "short":
        return summary.short(value)
    return f"{format(int(value) if how.endswith('d') else value, how)}{_interval(row, key)}"


def _interval(row: Row, key: str) -> str:
    low, high = _ends(row, key)
    return "" if low is None or high is None else f" ({summary.score(low)} to {summary.score(high)})"


def _ends(row: Row, key: str) -> tuple[float | None, float | None]:
    """Ends of the interval of a measure."""
    return _value(row, f"{key}_low"), _value(row, f"{key}_high")


def _name(row: Row) -> str:
    if row.get("kind") == "control":
        return f"control: {summary.printable(row.get('name', ''))}"
    width = _value(row, "width")
    narrow = "" if width in (None, 1.0) else f", width {width:g}"
    return f"depth {summary.printable(row.get('depth', ''), 20)}{narrow}, blocks {summary.block_ranges(_kept(row))}"


def _blocks(row: Row) -> str:
    kept = _kept(row)
    return f"first {len(kept)}" if summary.is_prefix(kept) else f"blocks {summary.block_ranges(kept)}"


def _kept(row: Row) -> tuple[int, ...]:
    return tuple(int(block) for block in str(row.get("kept") or "").split() if block.isdecimal())


def _is_plan(plan: SlimmingPlan, row: Row) -> bool:
    return row.get("kind") != "control" and _kept(row) == tuple(plan.kept_blocks) and _value(row, "width") == plan.width


def _is_whole(row: Row) -> bool:
    """Whether it has the first n blocks at full width."""
    return summary.is_prefix(_kept(row)) and _value(row, "width") in (None, 1.0)


def _first_blocks(rows: Sequence[Row]) -> list[Row]:
    """Encoders of the first n blocks at full width, in order of n."""
    prefixes = [row for row in rows if row.get("kind") != "control" and _kept(row) and _is_whole(row)]
    return sorted(prefixes, key=lambda row: len(_kept(row)))


def _points(rows: Sequence[Row], key: str, name: str) -> list[Point]:
    return [
        Point(depth, value, f"depth {depth:g}, {name}: {summary.score(value)}{_interval(row, key)}", *_ends(row, key))
        for row in rows
        if (depth := _value(row, "depth")) is not None and (value := _value(row, key)) is not None
    ]


def _value(row: Row, key: str) -> float | None:
    """A number of a row, or None if it was not measured."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
