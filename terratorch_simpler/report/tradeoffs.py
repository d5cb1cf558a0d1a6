"""What a sweep has measured: quality over cost, probes by depth, width, recovery, and the rows of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary
from terratorch_simpler.report.charts import (
    CHOSEN,
    CONTROL,
    CURVE,
    INK,
    OTHERS,
    SECOND,
    SOFT,
    STYLE,
    draw_series,
    new_figure,
    tip,
    to_svg,
)

Row = Mapping[str, Any]

COSTS = {
    "parameters": ("Parameters", "parameters in millions", 1e6),
    "macs": ("Operations", "MACs per tile in billions", 1e9),
    "latency_ms": ("Milliseconds", "milliseconds for one tile", 1.0),
}
"""Column: what it is, the label of its axis, and the unit of that."""
QUALITY = {
    "linear": "accuracy of a linear probe",
    "knn": "accuracy of nearest neighbours",
    "similarity": "similarity to the last block",
}
"""Quality of a slimmed encoder, the most informative measure first."""
SPREAD = 10
"""Ratio of the largest to the smallest cost above which the axis is logarithmic."""
MOST_LINES = 5
LABEL_GAP = 0.05
"""Least distance of two labels as a share of the axis."""
WIDTH_MARKERS = {"o": "dots", "s": "squares", "^": "triangles", "v": "turned triangles", "P": "crosses", "*": "stars"}
PROBES = {"linear": ("linear", CURVE, "-"), "knn": ("k-NN", SECOND, "--")}
TABLE_COLUMNS = {
    "depth": ("depth", "d"),
    "width": ("width", "g"),
    "chosen_by": ("chosen by", "words"),
    "parameters": ("parameters", ",d"),
    "macs": ("MACs", ",d"),
    "latency_ms": ("latency, ms", ".2f"),
    "throughput": ("tiles per s", ".1f"),
    "batch_size": ("at batch size", "d"),
    "peak_memory_mib": ("peak memory, MiB", ".0f"),
    "similarity": ("similarity", ".3f"),
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


def sweep_figure(rows: Sequence[Row]) -> Figure:
    """Quality over latency and over MACs, with a curve of the best encoders of every width.

    Args:
        rows: Rows of a sweep.
    """
    quality = _quality(rows) or "similarity"
    with mpl.rc_context(STYLE):
        figure = new_figure((11, 4.8))
        axes = figure.subplots(1, 2, sharey=True)
        for ax, cost in zip(axes, ("latency_ms", "macs"), strict=True):
            draw_trade_off(ax, rows, cost, quality)
        axes[1].set_ylabel("")
    name = summary.printable(rows[0]["name"])
    figure.suptitle(f"{name}: what every pruned encoder costs and keeps", fontsize=12, parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def draw_trade_off(axes: Axes, rows: Sequence[Row], cost: str, quality: str, plan: SlimmingPlan | None = None) -> None:
    """Quality over cost, one marker per width, with the Pareto front; encoders of unknown quality are upright lines.

    Args:
        axes: Where to draw.
        rows: Rows of a sweep.
        cost: A column of :data:`COSTS`.
        quality: A column of :data:`QUALITY`.
        plan: The plan whose encoder gets a ring; without it those that a criterion has chosen get one.
    """
    title, label, unit = COSTS[cost]
    known = [
        (row, x / unit, y)
        for row in rows
        if (x := _value(row, cost)) is not None and (y := _value(row, quality)) is not None
    ]
    slimmed = [entry for entry in known if entry[0].get("kind") != "control"]

    def value(row: Row) -> str:
        amount = f"{_name(row)}\n{_cost(float(row[cost]))} {title.lower()}"
        if (y := _value(row, quality)) is None:
            return f"{amount}\nquality not measured"
        return f"{amount}\n{QUALITY[quality]}: {y:.3f}{_interval(row, quality)}"

    labelled: list[tuple[Row, float, float]] = []
    for number, width in enumerate(_all_widths(rows)):
        entries = sorted((e for e in slimmed if (_value(e[0], "width") or 1.0) == width), key=lambda e: (e[1], -e[2]))
        color, marker = (CURVE, *OTHERS)[number % (len(OTHERS) + 1)], list(WIDTH_MARKERS)[number % len(WIDTH_MARKERS)]
        axes.plot([], [], marker, color=color, ms=5, label=f"width {width:g}")
        whole = [(x, y, value(row)) for row, x, y in entries if summary.is_prefix(_kept(row))]
        inner = [(x, y, value(row)) for row, x, y in entries if not summary.is_prefix(_kept(row))]
        for points, hollow in ((whole, False), (inner, True)):
            draw_series(axes, points, "", marker, hollow, color=color)
        front = _pareto_front(entries)
        axes.plot([x for _, x, _ in front], [y for _, _, y in front], "--", color=color, lw=1)
        labelled = labelled or front
        ends = [(x, _value(row, f"{quality}_low"), _value(row, f"{quality}_high")) for row, x, _ in entries]
        if number == 0 and ends and all(low is not None and high is not None for _, low, high in ends):
            xs, lows, highs = zip(*ends, strict=True)
            axes.fill_between(xs, lows, highs, color=color, alpha=0.12, lw=0, label="95 % interval")
    ringed = [e for e in slimmed if (_is_plan(plan, e[0]) if plan is not None else e[0].get("chosen_by"))]
    if ringed:
        ring = "the plan" if plan is not None else "chosen by a criterion"
        axes.plot(
            [x for _, x, _ in ringed], [y for _, _, y in ringed], "o", mfc="none", mec=CHOSEN, mew=1.8, ms=11, label=ring
        )
    controls = [row for row in rows if row.get("kind") == "control" and _value(row, cost) is not None]
    for number, row in enumerate(controls):
        x, y = float(row[cost]) / unit, _value(row, quality)
        name = summary.printable(row.get("name", ""), 40).replace("$", r"\$").lstrip("_")
        if y is None:
            line = axes.axvline(x, color=CONTROL, lw=1.5, ls=("--", ":")[number % 2], label=name)
        else:
            (line,) = axes.plot([x], [y], "D", color=CONTROL, ms=6, label=name)
        tip(line, "control", value(row))
    amounts = [x for row in rows if (x := _value(row, cost)) is not None]
    if amounts and min(amounts) > 0 and max(amounts) > SPREAD * min(amounts):
        axes.set_xscale("log")  # a control may be a hundred times as large, and would push all others together
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
    axes.set(xlabel=label, ylabel=QUALITY[quality])
    axes.margins(y=0.12)
    axes.grid(axis="y")
    last, scale = -math.inf, axes.transScale + axes.transLimits
    for row, x, y in labelled:
        if (place := scale.transform((x, y))[0]) - last > LABEL_GAP:
            text, last = summary.printable(row.get("depth", ""), 20), place
            axes.annotate(text, (x, y), (0, 6), textcoords="offset points", fontsize=9, ha="center", parse_math=False)


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
                "name": "slimmed"
                if row.get("name") == plan.backbone and row.get("kind") != "control"
                else summary.printable(row.get("name", "")),
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
    words = [("curve", "slimmed, with its depth.")]
    slimmed = [row for row in rows if row.get("kind") != "control"]
    if not all(summary.is_prefix(_kept(row)) for row in slimmed):
        words.append(("", "Hollow: blocks dropped from inside."))
    if len(widths := _all_widths(rows)) > 1:
        shapes = zip(WIDTH_MARKERS.values(), widths, strict=False)
        words.append(("", f"Width: {', '.join(f'{shape} {width:g}' for shape, width in shapes)}."))
    if any(row.get("kind") == "control" for row in rows):
        words.append(("control", "other official encoders; an upright line where only the cost is known."))
    better = "Upper left is better. No encoder of its width is better in both than those on a dashed line"
    words.append(("", f"{better}; the ring is the plan."))
    goal = "similarity" if quality == "similarity" else "accuracy"
    return [
        _card(
            f"{title} against {goal}", words, f"{QUALITY[quality]} over {label}",
            partial(draw_trade_off, rows=rows, cost=cost, quality=quality, plan=plan),
        )
        for cost, (title, label, _) in COSTS.items()
        if any(_value(row, cost) is not None and _value(row, quality) is not None for row in rows)
    ]  # fmt: skip


def _cost(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


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
            for row in prefixes:
                depth, low, high = (_value(row, column) for column in ("depth", f"{key}_low", f"{key}_high"))
                if depth is not None and low is not None and high is not None:
                    axes.plot([depth, depth], [low, high], color=color, lw=1.2, alpha=0.55)
            draw_series(axes, _points(prefixes, key, f"{name} probe"), line, color=color)
            draw_series(
                axes, _points(prefixes, f"{key}_recovered", f"{name} probe with recovery"), "", hollow=True, color=color
            )
        _by_depth(axes, "accuracy")

    words = [("curve", "linear;"), ("second", "k-NN, dashed."), ("", "Upright lines are intervals.")]
    if recovered:
        words.append(("", "Hollow dots: with linear recovery, no training."))
    return _card("Accuracy by depth", words, "Accuracy of probes by depth", draw)


def _widths(plan: SlimmingPlan, rows: Sequence[Row]) -> Card | None:
    quality = next(
        (key for key in QUALITY if any(_value(r, key) is not None and _value(r, "width") != 1.0 for r in rows)), None
    )
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        width, y = _value(row, "width"), None if quality is None else _value(row, quality)
        if width is not None and y is not None and row.get("kind") != "control":
            text = f"{_name(row)}\n{y:.3f}{_interval(row, str(quality))}"
            lines.setdefault(str(row.get("kept")), []).append((width, y, text))
    lines = {kept: sorted(points) for kept, points in lines.items() if len({x for x, _, _ in points}) > 1}
    if quality is None or not lines:
        return None
    step, own = -(-len(lines) // MOST_LINES), " ".join(map(str, plan.kept_blocks))
    shown = {kept: points for number, (kept, points) in enumerate(lines.items()) if kept == own or number % step == 0}

    def draw(axes: Axes) -> None:
        for kept, points in shown.items():
            draw_series(axes, points, color=CHOSEN if kept == own else CURVE)
            x, y, _ = points[0]
            axes.annotate(
                str(len(kept.split())), (x, y), (-8, 0), textcoords="offset points", ha="right", va="center", color=INK
            )
        axes.set(xlabel="width kept", ylabel=QUALITY[quality], xlim=(0, 1.04))
        axes.grid(axis="y")

    words = "Share of attention and MLP kept in every block; numbers are the blocks kept, the other colour is the plan."
    return _card("Quality by width", [("", words)], "Quality by width", draw)


def _recovery(rows: Sequence[Row]) -> Card | None:
    points = _points(_first_blocks(rows), "recovery_r2", "R²")
    if not points:
        return None

    def draw(axes: Axes) -> None:
        draw_series(axes, points)
        axes.axhline(1.0, color=SOFT, lw=0.8)
        _by_depth(axes, "R²")

    words = "Share of the last block's output that a linear map restores; 1 is all."
    return _card("Recovery without training", [("", words)], "R² of linear recovery by depth", draw)


def _gains(rows: Sequence[Row]) -> Card | None:
    bars = []
    for place, (key, (name, color, _)) in enumerate(PROBES.items()):
        for row in _first_blocks(rows):
            depth, before, after = (_value(row, column) for column in ("depth", key, f"{key}_recovered"))
            if depth is not None and before is not None and after is not None:
                gain = after - before
                bars.append((depth + (place - 0.5) * 0.4, gain, color, f"depth {depth:g}, {name}: {gain:+.3f}"))
    if not bars:
        return None

    def draw(axes: Axes) -> None:
        for x, gain, color, text in bars:
            tip(axes.bar([x], [gain], 0.36, color=color)[0], "bar", text)
        axes.axhline(0.0, color=SOFT, lw=0.8)
        _by_depth(axes, "accuracy gained")

    words = [("curve", "linear;"), ("second", "k-NN."), ("", "Accuracy with recovery less that without.")]
    return _card("What recovery gains", words, "Accuracy gained by recovery, by depth", draw)


def _by_depth(axes: Axes, label: str) -> None:
    axes.set(xlabel="blocks kept", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))
    axes.grid(axis="y")


def _cell(row: Row, key: str, how: str) -> str:
    if how == "words":
        return summary.printable(row.get(key) or "")
    value = _value(row, key)
    if value is None:
        return summary.MISSING
    return f"{format(int(value) if how.endswith('d') else value, how)}{_interval(row, key)}"


def _interval(row: Row, key: str) -> str:
    low, high = _value(row, f"{key}_low"), _value(row, f"{key}_high")
    return "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"


def _name(row: Row) -> str:
    if row.get("kind") == "control":
        return f"control: {summary.printable(row.get('name', ''))}"
    width = _value(row, "width")
    narrow = "" if width in (None, 1.0) else f", width {width:g}"
    return f"depth {summary.printable(row.get('depth', ''), 20)}{narrow}, blocks {summary.block_ranges(_kept(row))}"


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


def _points(rows: Sequence[Row], key: str, name: str) -> list[tuple[float, float, str]]:
    return [
        (depth, value, f"depth {depth:g}, {name}: {value:.3f}{_interval(row, key)}")
        for row in rows
        if (depth := _value(row, "depth")) is not None and (value := _value(row, key)) is not None
    ]


def _value(row: Row, key: str) -> float | None:
    """A number of a row, or None if it was not measured."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
