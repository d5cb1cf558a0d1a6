"""Every chart of a plan and of a sweep, drawn by matplotlib: as PNG in files of their own, as SVG in the page."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from terratorch_simpler.files import atomic_write
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary
from terratorch_simpler.report.palette import CARD, CHOSEN, CONTROL, CURVE, INK, RULE, SERIES, SOFT, VARIABLES, VOTES

MARKERS = "s^Dvo*"
"""Of the lines of several criteria, which so differ in more than their colour."""
MOST_CELLS = 48
"""Blocks up to which every pair has a cell of its own with its value; more would be megabytes."""
STYLE: dict[Any, Any] = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
    "grid.color": RULE, "axes.axisbelow": True, "axes.spines.top": False, "font.size": 10, "svg.fonttype": "none",
}  # fmt: skip
SMALL = (5.0, 3.4)
"""Inches of a chart in the page."""


def new_figure(size: tuple[float, float] = SMALL) -> Figure:
    """A figure that needs no window system and leaves the global state of pyplot alone.

    Args:
        size: Width and height in inches.
    """
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: The figure.
        path: File to write; missing folders are made.
    """
    with atomic_write(path) as part:
        figure.savefig(part, format="png")
    return Path(path)


def to_svg(figure: Figure, label: str, **attributes: str) -> str:
    """A figure as an SVG element of the page: no style attributes, which its policy forbids, and no ids but references.

    Args:
        figure: The figure; artists marked by :func:`tip` get a title with their value.
        label: What it shows, for readers who do not see it.
        **attributes: Further attributes of the element.
    """
    file = BytesIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = ElementTree.fromstring(file.getvalue())
    for parent in list(svg.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in [c for c in parent if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)
        given = {key.rpartition("}")[2]: value for key, value in parent.attrib.items()}
        style = given.pop("style", "")
        if parent.tag == "g":
            kind, found, text = given.pop("id", "").partition("|")
            if found:
                given["class"] = f"tip {kind}"
                title = ElementTree.Element("title")
                title.text = text.replace("\u2028", "\n")
                parent.insert(0, title)
        for name, value in re.findall(r"([\w-]+):\s*([^;]+)", style):
            if name == "font":
                given["font-size"] = re.search(r"[\d.]+px", value)[0]  # type: ignore[index]
            elif not name.startswith("font-") or name == "font-size":
                given[name] = f"var({VARIABLES[value]})" if value in VARIABLES else value
        parent.attrib.clear()
        parent.attrib.update(given)
    for name in ("width", "height", "version"):
        svg.attrib.pop(name, None)
    svg.attrib.update({"class": "chart", "role": "img", "tabindex": "0", "aria-label": label, **attributes})
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)


def tip(artist: Any, kind: str, text: str) -> None:
    """Give an artist the value that the page shows when it is pointed at.

    Args:
        artist: What is drawn.
        kind: Its class in the page.
        text: The value; lines are parted by newlines.
    """
    artist.set_gid(f"{kind}|{text.replace(chr(10), chr(0x2028))}")
    artist.set_in_layout(False)  # inside the axes: measuring hundreds of cells takes longer than drawing them


# --- a plan


def plan_figure(plan: SlimmingPlan) -> Figure:
    """Similarity of the blocks, score and votes of every depth, and what other criteria would keep where that is known.

    Args:
        plan: A plan with similarity or scores.
    """
    own, *others = summary.criteria(plan)
    scored, compared = bool(plan.scores or plan.votes), plan.similarity is not None
    widths = [*([1.0] if compared else []), *([1.35] if scored else []), *([1.35] if others else [])]
    with mpl.rc_context(STYLE):
        figure = new_figure((1.3 + 4.2 * sum(widths), 4.6))
        panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        if compared:
            draw_similarity(panels[0], plan)
            panels[0].set_title("Similarity of block outputs", pad=12)
        if scored:
            draw_criterion(panels[int(compared)], plan.full_num_blocks, own, plan.votes)
            panels[int(compared)].set_title(
                f"Score of every depth (criterion {summary.printable(own.name, 40)})", parse_math=False
            )
        if others:
            _draw_others(panels[-1], plan, others)
    # The text of a plan is not a formula.
    title = f"{summary.printable(plan.backbone)}: {summary.kept_words(plan)}"
    title = f"{title}, {plan.tiles_seen:,} tiles" if compared else title
    title = title if plan.verdict is None else f"{plan.verdict}\n{title}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def similarity_chart(plan: SlimmingPlan) -> str:
    """The heat map as SVG.

    Args:
        plan: A plan with similarity.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure((5.2, 4.3))
        draw_similarity(figure.subplots(), plan)
    return to_svg(figure, "Similarity of every pair of blocks", **{"data-columns": str(plan.full_num_blocks)})


def draw_similarity(axes: Axes, plan: SlimmingPlan) -> None:
    """Heat map of the linear CKA; dashed lines separate kept from dropped blocks, bars beside it mark the kept ones.

    Args:
        axes: Where to draw.
        plan: A plan with similarity.
    """
    blocks = plan.full_num_blocks
    similarity = np.asarray(plan.similarity, dtype=float)
    edges, low = (-0.5, blocks - 0.5), summary.lowest_shown(similarity.ravel())
    scale = {"vmin": low, "vmax": 1.0, "cmap": "viridis"}
    image = axes.imshow(similarity, origin="upper", extent=(*edges, *edges[::-1]), **scale)  # type: ignore[arg-type]
    if blocks <= MOST_CELLS:
        image.set_visible(False)
        for (i, j), value in np.ndenumerate(similarity):
            cell = axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=image.to_rgba(value), lw=0))
            tip(cell, "cell", f"blocks {i} and {j}: {value:.3f}")
    # Bands of colour, not an image: the page holds shapes only.
    bands = ScalarMappable(image.norm, mpl.colormaps["viridis"].resampled(40))
    axes.figure.colorbar(bands, ax=axes, label="linear CKA", shrink=0.85)
    kept = set(plan.kept_blocks)
    for block in range(1, blocks):
        if (block in kept) != (block - 1 in kept):
            for line in (axes.axhline, axes.axvline):
                line(block - 0.5, color="white", lw=2.5, alpha=0.8)
                line(block - 0.5, color=CHOSEN, lw=1.5, ls="--").set_gid("boundary|boundary of kept blocks")
    at = 1.02  # share of the axes
    for first, last in summary.runs(plan.kept_blocks):
        ends = (first - 0.4, last + 0.4)
        style: dict[str, Any] = {"color": CHOSEN, "lw": 4, "clip_on": False, "solid_capstyle": "butt"}
        axes.plot(ends, (at, at), transform=axes.get_xaxis_transform(), **style)
        axes.plot((1 - at, 1 - at), ends, transform=axes.get_yaxis_transform(), **style)
    axes.set(xlabel="block, numbered from 0", ylabel="block", xlim=edges, ylim=edges[::-1])
    axes.tick_params(axis="y", pad=8)  # beside the bars
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=3))


def criterion_chart(blocks: int, criterion: summary.Criterion, votes: Mapping[int, float] | None) -> str:
    """Scores, votes and kept blocks of one criterion as SVG.

    Args:
        blocks: Blocks of the intact encoder.
        criterion: What it would keep.
        votes: Depth -> share of resamples that choose it, if it has votes.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(SMALL if criterion.scores or votes else (SMALL[0], 0.8))
        draw_criterion(figure.subplots(), blocks, criterion, votes)
    return to_svg(figure, f"Scores and kept blocks of {summary.printable(criterion.name)}")


def draw_criterion(axes: Axes, blocks: int, criterion: summary.Criterion, votes: Mapping[int, float] | None = None) -> None:
    """Score and votes of every depth over the strip of kept blocks; depth n stands over block n - 1.

    Args:
        axes: Where to draw.
        blocks: Blocks of the intact encoder.
        criterion: What it would keep.
        votes: Depth -> share of resamples that choose it, if it has votes.
    """
    scores, depth, votes = criterion.scores or {}, len(criterion.kept), votes or {}
    _set_depth_axis(axes, blocks)
    axes.set_xlabel("depth: first blocks kept")
    axes.spines["right"].set_visible(bool(votes))
    if votes:
        share = axes.twinx()
        for bar, (of, won) in zip(
            share.bar(list(votes), list(votes.values()), width=0.7, color=VOTES), votes.items(), strict=True
        ):
            tip(bar, "votes", f"{of} blocks kept: {summary.percent(won)} of resamples")
        share.set(ylim=(0, 1), ylabel="share of resamples, %")
        share.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axes.set_zorder(share.get_zorder() + 1)  # the curve in front of the bars
        axes.patch.set_visible(False)
    if scores:
        axes.plot(list(scores), list(scores.values()), color=CURVE, lw=1.6)
        for of, value in scores.items():
            share_won = f"\n{summary.percent(votes[of])} of resamples" if of in votes else ""
            (dot,) = axes.plot([of], [value], "o", color=CURVE, ms=4)
            tip(dot, "dot", f"{of} blocks kept: score {summary.score(value)}{share_won}")
        if depth in scores:
            axes.plot([depth], [scores[depth]], "o", mfc="none", color=CHOSEN, mew=1.8, ms=10)
            axes.axvline(depth, color=CHOSEN, lw=1, ls="--", zorder=1)
        axes.set_ylabel("score, no unit")
        if criterion.probe is not None:
            _draw_probe(axes, blocks, scores, criterion.probe)
        axes.grid(axis="y")
        axes.margins(y=0.12)
    if not scores:
        axes.yaxis.set_visible(False)
    if not (scores or votes):
        step = -(-blocks // 8)
        axes.set_xticks(range(1, blocks + 1, step), [str(block) for block in range(0, blocks, step)])
        axes.set_xlabel("block, numbered from 0")
        axes.set_ylim(0, 1)
        axes.spines[["left", "bottom"]].set_visible(False)
        low, height, transform = 0.0, 1.0, axes.transData
    else:
        low, height, transform = -0.07, 0.045, axes.get_xaxis_transform()
        axes.tick_params(axis="x", length=0, pad=19)  # points: below the strip
    outline = Rectangle((0.5, low), blocks, height, fill=False, ec=SOFT, lw=0.8, transform=transform, clip_on=False)
    axes.add_patch(outline)
    for first, last in summary.runs(criterion.kept):
        color = CHOSEN if criterion.chosen else CURVE
        strip = Rectangle(
            (first + 0.5, low), last - first + 1, height, color=color, lw=0, transform=transform, clip_on=False
        )
        tip(axes.add_patch(strip), "kept", f"kept: blocks {summary.block_ranges(range(first, last + 1))}")


def _draw_probe(axes: Axes, blocks: int, scores: Mapping[int, float], probe: Mapping[str, Any]) -> None:
    """Standard errors of the scores, and the scores of the intact encoder and of a constant prediction."""
    for of, error in probe["errors"].items():
        if of in scores:
            (bar,) = axes.plot([of, of], [scores[of] - error, scores[of] + error], color=CURVE, lw=1)
            tip(bar, "error", f"{of} blocks kept: {summary.score(scores[of], error)}")
    marks = [("constant", probe["baseline"], CONTROL), (f"all {blocks}", probe["intact"], SOFT)]
    for (name, value, color), side in zip(sorted(marks, key=lambda mark: mark[1]), ("top", "bottom"), strict=True):
        line = axes.axhline(value, color=color, lw=1.2, ls=":", zorder=1)
        label = "constant prediction" if name == "constant" else f"{name} blocks"
        tip(line, "baseline", f"{label}: {summary.score(value)}")
        style: dict[str, Any] = {"color": color, "fontsize": 9, "va": side}  # beside the axes, and never on each other
        axes.annotate(name, (1, value), (3, 0), axes.get_yaxis_transform(), "offset points", **style)
    axes.set_ylabel(f"{summary.printable(probe['metric'], 24)} ± standard error", parse_math=False)


def _draw_others(axes: Axes, plan: SlimmingPlan, others: Sequence[summary.Criterion]) -> None:
    """Curves of the criteria that score depths, each on its own scale; below them the blocks that each would keep."""
    _set_depth_axis(axes, plan.full_num_blocks)
    axes.set_title("What other criteria would keep")
    axes.set_xlabel("depth: first blocks kept; bars: the blocks themselves")
    room = 0.13
    for number, criterion in enumerate(others):
        style: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        known = criterion.scores or {}
        low, high = (min(known.values()), max(known.values())) if known else (0.0, 0.0)
        scores = {depth: (value - low) / (high - low) if high > low else 0.5 for depth, value in known.items()}
        axes.plot(list(scores), list(scores.values()), "-", ms=3.5, lw=1.2, **style)
        if len(criterion.kept) in scores:
            axes.plot(len(criterion.kept), scores[len(criterion.kept)], ms=10, fillstyle="none", mew=1.8, **style)
        y = -room * (number + 1)
        for first, last in summary.runs(criterion.kept):  # depth n stands over block n - 1
            axes.fill_between((first + 0.5, last + 1.5), y - 0.3 * room, y + 0.3 * room, color=style["color"], lw=0)
    names = [f"{summary.printable(criterion.name, 24)}: {len(criterion.kept)}" for criterion in others]
    axes.set_yticks([-room * (number + 1) for number in range(len(others))], names, fontsize=9)
    for number, label in enumerate(axes.get_yticklabels()):
        label.set(color=SERIES[number % len(SERIES)], parse_math=False)
    axes.axhline(-0.4 * room, color=SOFT, lw=0.8)
    bottom, top = -room * (len(others) + 0.7), 1.08
    axes.axvline(len(plan.kept_blocks), ymin=(-0.4 * room - bottom) / (top - bottom), color=CHOSEN, lw=1, ls="--", zorder=1)
    axes.set_ylim(bottom, top)
    axes.text(
        -0.015, (0.5 - bottom) / (top - bottom), "score, each scaled 0 to 1", rotation=90, ha="right", va="center",
        transform=axes.transAxes, fontsize=9,
    )  # fmt: skip


def _set_depth_axis(axes: Axes, blocks: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=3))
    axes.set_xlim(0.5, blocks + 0.5)


# --- lines and points with values


class Point(NamedTuple):
    """A point of a chart.

    Attributes:
        x: Where it is.
        y: Its value.
        text: What the page shows when it is pointed at.
        low: Lower end of its interval; None without one.
        high: Upper end.
    """

    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None


def draw_series(
    axes: Axes, points: Iterable[Point], line: str = "-", marker: str = "o", hollow: bool = False, **style: Any
) -> None:
    """A line through points that show their values, with intervals where they are known.

    Args:
        axes: Where to draw.
        points: The points, in order.
        line: Line style of matplotlib; "" for none.
        marker: Marker of matplotlib.
        hollow: Whether the markers are not filled.
        **style: Further arguments of ``Axes.plot``.
    """
    points, style = list(points), {"color": CURVE, "lw": 1.5, **style}
    for point in points:
        if point.low is not None and point.high is not None:
            axes.plot([point.x, point.x], [point.low, point.high], color=style["color"], lw=1.2, alpha=0.5)
    if line:
        axes.plot([point.x for point in points], [point.y for point in points], line, **style)
    for point in points:
        (dot,) = axes.plot([point.x], [point.y], marker, ms=5, mfc=CARD if hollow else style["color"], **style)
        tip(dot, "dot", point.text)
