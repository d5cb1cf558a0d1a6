"""What a sweep has measured, for the page: cost against quality, probes by depth, width, recovery, and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary
from terratorch_simpler.report.svg import Chart, Point, element, log_ticks, span, ticks, whole_ticks

Row = Mapping[str, Any]

COSTS = {
    "parameters": ("Parameters", "parameters in millions", 1e6),
    "macs": ("Operations", "MACs per tile in billions", 1e9),
    "latency_ms": ("Milliseconds", "milliseconds for one tile", 1.0),
}
"""Column: what it is, the name of its axis, and the unit of that."""
QUALITY = {
    "linear": "accuracy of a linear probe",
    "knn": "accuracy of nearest neighbours",
    "similarity": "similarity to the last block",
}
"""What a slimmed encoder is worth, the one that says most first."""
SPREAD = 10
"""How many times as much the largest may cost as the smallest before the axis goes by factors."""
MOST_LINES = 5
PROBES = {"linear": "linear", "knn": "k-NN"}
COLUMNS = {
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


def measured_section(plan: SlimmingPlan, rows: Sequence[Row]) -> Element:
    """Charts of what was measured, as far as it was, and all rows.

    Args:
        plan: The plan of the same encoder; its row is marked.
        rows: Rows of the sweep.
    """
    cards = [*_trade_offs(plan, rows), _probes(rows), _widths(plan, rows), _recovery(rows), _gains(rows)]
    return element(
        "section",
        element("h2", "What slimmed encoders are worth"),
        element(
            "p",
            "Each encoder was built, timed on one device, and, where there were labels, its frozen features were judged by "
            "probes; ranges are bootstrap intervals over images, and a difference within them is noise. A probe "
            "tells what an encoder knows before it is fine-tuned, not the score after that.",
            class_="how",
        ),
        element("div", *(card for card in cards if card is not None), class_="cards"),
        _table(plan, rows),
    )


def blocks_section(blocks: Sequence[Row]) -> Element:
    """How rich the output of every block is.

    Args:
        blocks: Rows of blocks.csv.
    """
    head = element("tr", *(element("th", name, scope="col") for name, _ in BLOCK_COLUMNS.values()))
    body = [
        element("tr", *(element("td", _cell(row, key, how)) for key, (_, how) in BLOCK_COLUMNS.items())) for row in blocks
    ]
    return element(
        "section",
        element("h2", "How rich the output of every block is"),
        element(
            "p",
            "Over patches of the streamed tiles, as the intact encoder leaves them after a block. Little in few directions, "
            "and features that are alike, say that a block's output is narrower than its number of features.",
            class_="how",
        ),
        element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll"),
    )


def _trade_offs(plan: SlimmingPlan, rows: Sequence[Row]) -> list[Element]:
    """Quality over every cost that was measured; diamonds are controls, the ring is the plan."""
    quality = next((key for key in QUALITY if any(_value(row, key) is not None for row in rows)), None)
    if quality is None:
        return []
    return [card for cost in COSTS if (card := _trade_off(plan, rows, cost, quality)) is not None]


def _trade_off(plan: SlimmingPlan, rows: Sequence[Row], cost: str, quality: str) -> Element | None:
    title, x_label, unit = COSTS[cost]
    known = []
    for row in rows:
        x, y = _value(row, cost), _value(row, quality)
        if x is not None and y is not None:
            tip = f"{_name(row)}\n{_cost(x)} {title.lower()}\n{QUALITY[quality]}: {y:.3f}{_interval(row, quality)}"
            known.append((row, Point(x / unit, y, tip)))
    if not known:
        return None
    y_range = span([point.y for _, point in known])
    costs = [x / unit for row in rows if (x := _value(row, cost)) is not None]
    # A control may be a hundred times as large, and would push all others together.
    log = min(costs) > 0 and max(costs) > SPREAD * min(costs)
    x_range = (min(costs) / 1.15, max(costs) * 1.15) if log else (0.0, max(costs) * 1.06 or 1.0)
    chart = Chart(x_range, y_range, height=250.0, log_x=log)
    x_ticks = log_ticks(*x_range) if log else ticks(*x_range)
    svg = chart.picture(f"{QUALITY[quality]} over {x_label}", x_label, QUALITY[quality], x_ticks, ticks(*y_range, 5))
    front = _pareto_front([point for _, point in known])
    svg.append(chart.line(front, "line front"))
    slimmed = [(row, point) for row, point in known if row.get("kind") != "control"]
    svg.extend(chart.dots((point for row, point in slimmed if _is_whole(row)), "dot"))
    svg.extend(chart.dots((point for row, point in slimmed if not _is_whole(row)), "dot hollow"))
    svg.extend(chart.diamonds((point for row, point in known if row.get("kind") == "control"), "control"))
    svg.extend(_cost_only(chart, rows, cost, quality, y_range[0]))
    for row, point in known:
        if _is_plan(plan, row):
            svg.append(element("circle", cx=chart.x(point.x), cy=chart.y(point.y), r=7.5, class_="ring"))
        if row.get("kind") != "control" and point in front and _is_whole(row):
            text = summary.printable(row.get("depth", ""), 20)
            svg.append(element("text", text, x=chart.x(point.x), y=chart.y(point.y) - 8, class_="middle label"))
    words: list[Element | str] = [_key("curve", " slimmed, with its depth. ")]
    if not all(_is_whole(row) for row, _ in slimmed):
        words.append("Hollow: narrower, or with blocks dropped from inside. ")
    if any(row.get("kind") == "control" for row in rows):
        words.append(_key("control", " other official encoders; on the axis where only their cost is known. "))
    return _card(
        f"{title} against {'similarity' if quality == 'similarity' else 'accuracy'}",
        [*words, "Upper left is better. No encoder is better in both than those on the dashed line; the ring is the plan."],
        svg,
    )


def _cost_only(chart: Chart, rows: Sequence[Row], cost: str, quality: str, floor: float) -> list[Element]:
    """Controls that were timed but not judged, on the axis."""
    unit = COSTS[cost][2]
    points = [
        Point(x / unit, floor, f"{_name(row)}\n{_cost(x)} {COSTS[cost][0].lower()}\nquality not measured")
        for row in rows
        if row.get("kind") == "control" and _value(row, quality) is None and (x := _value(row, cost)) is not None
    ]
    return chart.diamonds(points, "control")


def _cost(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that none is cheaper than and at least as good, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _probes(rows: Sequence[Row]) -> Element | None:
    """Accuracy of each probe after the first n blocks, with intervals; hollow dots are with recovery."""
    found = _first_blocks(rows)
    series = {key: _points(found, key, f"{name} probe") for key, name in PROBES.items()}
    repaired = {key: _points(found, f"{key}_recovered", f"{name} probe with recovery") for key, name in PROBES.items()}
    everything = [point for points in (*series.values(), *repaired.values()) for point in points]
    if not any(series.values()):
        return None
    limits = [
        v for row in found for key in PROBES for end in ("low", "high") if (v := _value(row, f"{key}_{end}")) is not None
    ]
    y_range = span([*(point.y for point in everything), *limits])
    svg, chart = _by_depth(found, y_range, "accuracy", "Accuracy of probes by depth")
    for key, points in series.items():
        second = " second" if key == "knn" else ""
        for row in found:
            depth, low, high = (_value(row, name) for name in ("depth", f"{key}_low", f"{key}_high"))
            if depth is not None and low is not None and high is not None:
                svg.append(chart.whisker(depth, low, high, f"whisker{second}"))
        svg.append(chart.line(points, f"line{second}"))
        svg.extend(chart.dots(points, f"dot{second}"))
        svg.extend(chart.dots(repaired[key], f"dot hollow{second}"))
    words = [_key("curve", " linear; "), _key("second", " k-NN, dashed. "), "Upright lines are intervals."]
    if any(repaired.values()):
        words.append(" Hollow dots: with linear recovery, no training.")
    return _card("Accuracy by depth", words, svg)


def _widths(plan: SlimmingPlan, rows: Sequence[Row]) -> Element | None:
    """Quality over the width, one line for every set of kept blocks that was measured at several."""
    quality = next(
        (key for key in QUALITY if any(_value(r, key) is not None and _value(r, "width") != 1.0 for r in rows)), None
    )
    lines: dict[str, list[Point]] = {}
    for row in rows:
        width, y = _value(row, "width"), None if quality is None else _value(row, quality)
        if width is not None and y is not None and row.get("kind") != "control":
            lines.setdefault(str(row.get("kept")), []).append(
                Point(width, y, f"{_name(row)}\n{y:.3f}{_interval(row, str(quality))}")
            )
    lines = {kept: sorted(points) for kept, points in lines.items() if len({point.x for point in points}) > 1}
    if quality is None or not lines:
        return None
    step = -(-len(lines) // MOST_LINES)
    own = " ".join(map(str, plan.kept_blocks))
    lines = {kept: points for number, (kept, points) in enumerate(lines.items()) if kept == own or number % step == 0}
    y_range = span([point.y for points in lines.values() for point in points])
    chart = Chart((0.0, 1.04), y_range)
    svg = chart.picture("Quality by width", "width kept", QUALITY[quality], ticks(0, 1, 5), ticks(*y_range, 5))
    for kept, points in lines.items():
        svg.append(chart.line(points, "line picked" if kept == own else "line"))
        svg.extend(chart.dots(points, "dot picked" if kept == own else "dot"))
        end = points[0]
        svg.append(element("text", str(len(kept.split())), x=chart.x(end.x) - 9, y=chart.y(end.y) + 4, class_="end label"))
    return _card(
        "Quality by width",
        ["Share of attention and MLP kept in every block; numbers are the blocks kept, the other colour is the plan."],
        svg,
    )


def _recovery(rows: Sequence[Row]) -> Element | None:
    points = _points(_first_blocks(rows), "recovery_r2", "R²")
    if not points:
        return None
    y_range = span([point.y for point in points], include=[1.0])
    svg, chart = _by_depth(rows, y_range, "R²", "R² of linear recovery by depth")
    svg.append(chart.line(points, "line"))
    svg.extend(chart.dots(points, "dot"))
    return _card(
        "Recovery without training", ["Share of the last block's output that a linear map restores; 1 is all."], svg
    )


def _gains(rows: Sequence[Row]) -> Element | None:
    """What recovery adds to each probe."""
    found = _first_blocks(rows)
    bars = []
    for place, (key, name) in enumerate(PROBES.items()):
        for row in found:
            depth, before, after = (_value(row, column) for column in ("depth", key, f"{key}_recovered"))
            if depth is not None and before is not None and after is not None:
                bars.append(
                    (depth + (place - 0.5) * 0.4, after - before, key, f"depth {depth:g}, {name}: {after - before:+.3f}")
                )
    if not bars:
        return None
    y_range = span([gain for _, gain, _, _ in bars], include=[0.0])
    svg, chart = _by_depth(rows, y_range, "accuracy gained", "Accuracy gained by recovery, by depth")
    for x, gain, key, tip in bars:
        svg.append(chart.bar(x, 0.0, gain, 0.36, "bar second" if key == "knn" else "bar", tip))
    svg.append(
        element(
            "line", x1=chart.x(chart.x_range[0]), x2=chart.x(chart.x_range[1]), y1=chart.y(0), y2=chart.y(0), class_="axis"
        )
    )
    words = [_key("curve", " linear; "), _key("second", " k-NN. "), "Accuracy with recovery less that without."]
    return _card("What recovery gains", words, svg)


def _table(plan: SlimmingPlan, rows: Sequence[Row]) -> Element:
    shown = {key: column for key, column in COLUMNS.items() if any(row.get(key) not in (None, "") for row in rows)}
    names = (element("th", name, scope="col", class_="left" if how == "words" else None) for name, how in shown.values())
    head = element("tr", element("th", "encoder", scope="col", class_="left"), *names)
    body = []
    for row in rows:
        cells = [
            element("td", _cell(row, key, how), class_="words" if how == "words" else None)
            for key, (_, how) in shown.items()
        ]
        name = "slimmed" if row.get("name") == plan.backbone and row.get("kind") != "control" else row.get("name", "")
        first = element("th", summary.printable(name), scope="row", class_="left")
        body.append(element("tr", first, *cells, class_="picked" if _is_plan(plan, row) else None))
    return element("div", element("table", element("thead", head), element("tbody", *body), class_="many"), class_="scroll")


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
    found = [row for row in rows if row.get("kind") != "control" and _kept(row) and _is_whole(row)]
    return sorted(found, key=lambda row: len(_kept(row)))


def _points(rows: Sequence[Row], key: str, name: str) -> list[Point]:
    return [
        Point(depth, value, f"depth {depth:g}, {name}: {value:.3f}{_interval(row, key)}")
        for row in rows
        if (depth := _value(row, "depth")) is not None and (value := _value(row, key)) is not None
    ]


def _by_depth(rows: Sequence[Row], y_range: tuple[float, float], y_label: str, label: str) -> tuple[Element, Chart]:
    deepest = max(len(_kept(row)) for row in _first_blocks(rows))
    chart = Chart((0.4, deepest + 0.6), y_range)
    return chart.picture(label, "blocks kept", y_label, whole_ticks(1, deepest), ticks(*y_range, 5)), chart


def _card(title: str, words: Sequence[Element | str], chart: Element) -> Element:
    return element("figure", element("h3", title), element("p", *words), chart, class_="card")


def _key(class_: str, words: str) -> Element:
    key = element("span", class_=f"key {class_}")
    return element("span", key, words)


def _value(row: Row, key: str) -> float | None:
    """A number of a row, or None if it was not measured."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
