"""A plan as one figure: the similarity of the blocks, the score of every depth, and what other criteria would keep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from terratorch_simpler.files import atomic_write
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary
from terratorch_simpler.report.svg import lowest_shown

CHOSEN = "#d1495b"
CURVE = "#1b4965"
VOTES = "#bfd7ea"
OTHERS = ("#0b7a75", "#b8860b", "#7b5ea7", "#5b6875", "#c2371f", "#2f6db3")
"""Lines of other criteria; markers differ as well, for those who do not see the colours."""
MARKERS = "s^Dvo*"


def plan_figure(plan: SlimmingPlan) -> Figure:
    """Heat map of the similarity, the score curve with the votes, and what other criteria would keep where that is known.

    Args:
        plan: A plan with similarity.
    """
    others = [rule for rule in summary.rules(plan) if not rule.chosen]
    judged = bool(plan.scores or plan.votes)
    widths = [1.0, *([1.35] if judged else []), *([1.35] if others else [])]
    figure = Figure(figsize=(1.3 + 4.2 * sum(widths), 4.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # no window system needed, and pyplot's global state stays untouched
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    _draw_similarity(panels[0], plan)
    if judged:
        _draw_scores(panels[1], plan)
    if others:
        _draw_others(panels[-1], plan, others)
    name = summary.printable(plan.backbone)
    # The text of a plan is no formula.
    title = f"{name}: {summary.kept_words(plan)}, {plan.tiles_seen:,} tiles"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def _draw_similarity(axes: Axes, plan: SlimmingPlan) -> None:
    blocks = plan.full_num_blocks
    similarity = np.asarray(plan.similarity, dtype=float)
    edges, low = (-0.5, blocks - 0.5), lowest_shown(similarity.ravel())
    image = axes.imshow(similarity, origin="upper", extent=(*edges, *edges[::-1]), vmin=low, vmax=1, cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="linear CKA", shrink=0.85)
    held = set(plan.kept_blocks)
    for block in range(1, blocks):
        if (block in held) != (block - 1 in held):
            for line in (axes.axhline, axes.axvline):
                line(block - 0.5, color="white", lw=2.5, alpha=0.8)
                line(block - 0.5, color=CHOSEN, lw=1.5, ls="--")
    at = 1.02  # share of the axes: bars beside the map show what is kept
    for first, last in summary.runs(plan.kept_blocks):
        ends, style = (first - 0.4, last + 0.4), {"color": CHOSEN, "lw": 4, "clip_on": False, "solid_capstyle": "butt"}
        axes.plot(ends, (at, at), transform=axes.get_xaxis_transform(), **style)
        axes.plot((1 - at, 1 - at), ends, transform=axes.get_yaxis_transform(), **style)
    axes.set(xlabel="block", ylabel="block", xlim=edges, ylim=edges[::-1])
    axes.set_title("Similarity of block outputs", pad=12)
    axes.tick_params(axis="y", pad=8)  # beside the bars
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=3))


def _draw_scores(axes: Axes, plan: SlimmingPlan) -> None:
    kept, scores = len(plan.kept_blocks), plan.scores or {}
    _set_depth_axis(axes, plan, f"Score of every depth (criterion {summary.printable(plan.criterion['name'], 40)})", "score")
    axes.plot(list(scores), list(scores.values()), "-o", color=CURVE, ms=4, zorder=3, label="score")
    axes.axvline(kept, color=CHOSEN, lw=1, ls="--", zorder=2)
    if kept in scores:
        axes.plot([kept], [scores[kept]], "o", color=CHOSEN, ms=9, zorder=4, label=f"chosen: {kept}")
    handles, labels = axes.get_legend_handles_labels()
    if plan.votes is not None:
        share = axes.twinx()
        share.bar(
            list(plan.votes), list(plan.votes.values()), width=0.7, color=VOTES, zorder=1, label="share of resamples won"
        )
        share.set(ylim=(0, 1), ylabel="share of resamples won")
        axes.set_zorder(share.get_zorder() + 1)  # the curve in front of the bars
        axes.patch.set_visible(False)
        more = share.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.grid(axis="y", alpha=0.3)
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, frameon=False)


def _draw_others(axes: Axes, plan: SlimmingPlan, others: Sequence[summary.Rule]) -> None:
    """Curves of the criteria that score depths, each on a scale of its own; under them, the blocks that each would keep."""
    _set_depth_axis(axes, plan, "What other criteria would keep", "")
    axes.set_xlabel("blocks kept (curves: scores, each from least to best)")
    room = 0.13
    for number, rule in enumerate(others):
        style = {"color": OTHERS[number % len(OTHERS)], "marker": MARKERS[number % len(MARKERS)]}
        low, high = (min(rule.scores.values()), max(rule.scores.values())) if rule.scores else (0.0, 0.0)
        scores = {depth: (value - low) / (high - low) if high > low else 0.5 for depth, value in (rule.scores or {}).items()}
        axes.plot(list(scores), list(scores.values()), "-", ms=3.5, lw=1.2, **style)
        if len(rule.kept) in scores:
            axes.plot(len(rule.kept), scores[len(rule.kept)], ms=10, fillstyle="none", mew=1.8, **style)
        y = -room * (number + 1)
        for first, last in summary.runs(rule.kept):  # depth n stands over block n - 1
            axes.fill_between((first + 0.5, last + 1.5), y - 0.3 * room, y + 0.3 * room, color=style["color"], lw=0)
    names = [f"{summary.printable(rule.name, 24)}: {len(rule.kept)}" for rule in others]
    axes.set_yticks([-room * (number + 1) for number in range(len(others))], names, fontsize=9)
    for label, number in zip(axes.get_yticklabels(), range(len(others)), strict=True):
        label.set(color=OTHERS[number % len(OTHERS)], parse_math=False)
    axes.axhline(-0.4 * room, color="#999999", lw=0.8)
    bottom, top = -room * (len(others) + 0.7), 1.08
    floor = (-0.4 * room - bottom) / (top - bottom)
    axes.axvline(len(plan.kept_blocks), ymin=floor, color=CHOSEN, lw=1, ls="--", zorder=1)
    axes.set_ylim(bottom, top)


def _set_depth_axis(axes: Axes, plan: SlimmingPlan, title: str, y_label: str) -> None:
    axes.set(xlabel="blocks kept", ylabel=y_label)
    axes.set_title(title, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=3))
    axes.set_xlim(0.5, plan.full_num_blocks + 0.5)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: The figure.
        path: File to write; missing folders are made.
    """
    with atomic_write(path) as part:
        figure.savefig(part, format="png")
    return Path(path)
