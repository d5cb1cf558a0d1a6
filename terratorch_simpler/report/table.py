"""A plan as one table for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from terratorch_simpler.plan import SlimmingPlan


def plan_table(plan: SlimmingPlan) -> Group:
    """Depth, parameters and MACs before and after, and what the choice rests on.

    Args:
        plan: A plan.

    Returns:
        What a rich console prints: a heading, a table and a line below it.
    """
    table = Table()
    table.add_column("encoder")
    for column in ("before", "after", "kept"):
        table.add_column(column, justify="right")
    table.add_row("blocks", *_row(plan.full_num_blocks, len(plan.kept_blocks)))
    if plan.width != 1:
        table.add_row("width", "1", f"{plan.width:g}", f"{plan.width:.1%}")
    if plan.parameters is not None:
        table.add_row("parameters", *_row(plan.parameters["before"], plan.parameters["after"]))
    if plan.macs is not None:
        table.add_row("MACs per tile", *_row(plan.macs["before"], plan.macs["after"]))
    return Group(Text(f"{plan.backbone}: {_kept(plan)}", style="bold"), table, Text(_reasons(plan)))


def _row(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / before:.1%}"


def _kept(plan: SlimmingPlan) -> str:
    kept = plan.kept_blocks
    blocks = f"first {len(kept)}" if kept == tuple(range(len(kept))) else f"blocks {', '.join(map(str, kept))}"
    width = "" if plan.width == 1 else f" at width {plan.width:g}"
    return f"{blocks} of {plan.full_num_blocks} blocks kept{width}"


def _reasons(plan: SlimmingPlan) -> str:
    depth = len(plan.kept_blocks)
    parts = [f"criterion {plan.criterion['name']}"]
    if plan.scores is not None and depth in plan.scores:
        runner_up = max((s for d, s in plan.scores.items() if d != depth), default=None)
        beside = "" if runner_up is None else f", next best {runner_up:.3f}"
        parts.append(f"score {plan.scores[depth]:.3f}{beside}")
    if plan.votes is not None:
        parts.append(f"won {plan.votes.get(depth, 0.0):.0%} of resamples")
    elif plan.tiles_seen:
        parts.append("too few tiles for votes")
    if plan.tiles_seen:
        parts.append(f"{plan.tiles_seen:,} tiles, {plan.rows_seen:,} tokens")
    return "; ".join(parts)
