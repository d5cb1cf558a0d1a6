"""A plan as one figure: the similarity of the blocks beside the score of every cut."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from terratorch_simpler.files import whole_file
from terratorch_simpler.plan import SlimmingPlan

CHOSEN = "#d1495b"
CURVE = "#1b4965"
VOTES = "#bfd7ea"


def plan_figure(plan: SlimmingPlan) -> Figure:
    """Heat map of the similarity, and the score curve with the chosen depth and the bootstrap votes.

    Args:
        plan: A plan with similarity and scores.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # no window system needed, and pyplot's global state stays untouched
    heat, curve = figure.subplots(1, 2, width_ratios=(1, 1.35))
    _draw_similarity(heat, plan)
    _draw_scores(curve, plan)
    kept = len(plan.kept_blocks)
    figure.suptitle(f"{plan.backbone}: {kept} of {plan.full_num_blocks} blocks kept, {plan.tiles_seen:,} tiles", fontsize=12)
    return figure


def _draw_similarity(axes: Axes, plan: SlimmingPlan) -> None:
    blocks, kept = plan.full_num_blocks, len(plan.kept_blocks)
    similarity = np.asarray(plan.similarity, dtype=float)
    edges = (0.5, blocks + 0.5)
    image = axes.imshow(similarity, origin="upper", extent=(*edges, *edges[::-1]), vmin=0, vmax=1, cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="linear CKA", shrink=0.85)
    if plan.kept_blocks == tuple(range(kept)) and kept < blocks:
        axes.axhline(kept + 0.5, color=CHOSEN, lw=1.5)
        axes.axvline(kept + 0.5, color=CHOSEN, lw=1.5)
    axes.set(xlabel="block", ylabel="block", title="Similarity of block outputs")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=3))


def _draw_scores(axes: Axes, plan: SlimmingPlan) -> None:
    kept = len(plan.kept_blocks)
    axes.set(xlabel="blocks kept", ylabel="score g", title=f"Score of every cut (criterion {plan.criterion['name']})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=3))
    axes.set_xlim(0.5, plan.full_num_blocks + 0.5)
    scores = plan.scores or {}
    axes.plot(list(scores), list(scores.values()), "-o", color=CURVE, ms=4, zorder=3, label="score")
    axes.axvline(kept, color=CHOSEN, lw=1, ls="--", zorder=2)
    if kept in scores:
        axes.plot([kept], [scores[kept]], "o", color=CHOSEN, ms=9, zorder=4, label=f"chosen: {kept}")
    if plan.votes is not None:
        share = axes.twinx()
        share.bar(
            list(plan.votes), list(plan.votes.values()), width=0.7, color=VOTES, zorder=1, label="share of resamples won"
        )
        share.set(ylim=(0, 1), ylabel="share of resamples won")
        axes.set_zorder(share.get_zorder() + 1)  # the curve in front of the bars
        axes.patch.set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if plan.votes is not None:
        more = share.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.figure.legend(handles, labels, loc="outside lower right", ncols=3, fontsize=9, frameon=False)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: The figure.
        path: File to write; missing folders are made.
    """
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return Path(path)
