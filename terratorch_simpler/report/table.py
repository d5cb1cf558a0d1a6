"""A plan in the terminal, and as Markdown for loggers that take text."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary

CELL = 3
"""Columns of a cell of the heat map: a per cent number and a space."""
BAR = 8


def plan_table(plan: SlimmingPlan) -> Group:
    """Depth, parameters and MACs before and after, and what the choice rests on.

    Args:
        plan: A plan.

    Returns:
        What a rich console prints: the verdict, a heading, a table and a line below it.
    """
    head, *rows = plan_rows(plan)
    table = Table()
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    why = Text(summary.printable("; ".join(summary.reasons(plan))))
    sets = [_label_set_table(plan)] if summary.label_sets(plan) else []
    return Group(*_verdict(plan), Text(_heading(plan), style="bold"), table, *sets, why)


def _label_set_table(plan: SlimmingPlan) -> Table:
    """A row for every label set."""
    table = Table(
        box=box.SIMPLE_HEAD, title="What each label set asks for", title_justify="left", pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    for number, column in enumerate(summary.LABEL_SET_HEAD):
        table.add_column(column, justify="right" if 0 < number < len(summary.LABEL_SET_HEAD) - 1 else "left")
    for each in summary.label_sets(plan):
        table.add_row(*map(Text, each.cells(plan.full_num_blocks)), style="bold" if each.chosen else None)
    return table


def full_table(plan: SlimmingPlan) -> Group:
    """The same, what every depth costs and what every criterion would keep, and the similarity if there is room for it.

    Args:
        plan: A plan.
    """
    parts: list[RenderableType] = [plan_table(plan), Text(), *([_depth_table(plan)] if summary.depths(plan) else [])]
    if plan.overview is not None:
        parts.append(_criterion_table(plan))
    return Group(*parts, *([_HeatMap(plan.similarity)] if plan.similarity is not None else []))


def plan_markdown(plan: SlimmingPlan) -> str:
    """The table of :func:`plan_table` in Markdown; text of the plan is escaped."""
    head, *rows = plan_rows(plan)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", "---:", "---:", "---:"], *rows))
    heading, why = (_no_markup(text) for text in (_heading(plan), "; ".join(summary.reasons(plan))))
    verdict = summary.verdict_words(plan)
    first = "" if verdict is None else f"**{_no_markup(verdict)}**\n\n"
    return f"{first}**{heading}**\n\n{table}\n\n{why}\n"


def _no_markup(text: str) -> str:
    """Text that neither Markdown nor HTML takes for anything else."""
    return "".join(
        f"&#{ord(letter)};" if letter in "\\`*_{}[]()#|!" else html.escape(letter)
        for letter in summary.printable(text, summary.LONGEST_VERDICT)
    )


def _verdict(plan: SlimmingPlan) -> list[Text]:
    words = summary.verdict_words(plan)
    if words is None or plan.verdict is None:
        return []
    colour = {"clear": "green", "weak": "yellow"}.get(plan.verdict.level, "red")
    return [Text(words, style=f"bold {colour}")]


def _heading(plan: SlimmingPlan) -> str:
    return f"{summary.printable(plan.backbone)}: {summary.kept_words(plan)}"


def plan_rows(plan: SlimmingPlan) -> list[list[str]]:
    """What was there before and is there after, with its names as the first row."""
    rows = [["encoder", "before", "after", "kept"]]
    blocks = {"before": plan.full_num_blocks, "after": len(plan.kept_blocks)}
    for name, pair in (("blocks", blocks), ("parameters", plan.parameters), ("MACs per tile", plan.macs)):
        if pair is not None:
            before, after = pair["before"], pair["after"]
            rows.append([name, f"{before:,}", f"{after:,}", summary.share(after, before)])
    if plan.width != 1:
        rows.insert(2, ["width", "1", f"{plan.width:g}", f"{plan.width:.1%}"])
    return rows


def _depth_table(plan: SlimmingPlan) -> Table:
    """A row for every depth; columns of which nothing is known are left out."""
    found = summary.depths(plan)
    whole = (plan.parameters or {}).get("before") or found[-1].parameters
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "score": ("score", lambda depth: summary.score(depth.score)),
        "votes": ("votes", lambda depth: summary.MISSING if depth.votes is None else f"{depth.votes:.1%}"),
        "parameters": ("parameters", lambda depth: f"{summary.short(depth.parameters)} {_bar(depth.parameters, whole)}"),
        "macs": ("MACs", lambda depth: summary.short(depth.macs)),
        "similarity": ("similarity", lambda depth: _three_digits(depth.similarity)),
        "recovery_r2": ("R²", lambda depth: _three_digits(depth.recovery_r2)),
    }
    shown = {key: column for key, column in columns.items() if any(getattr(depth, key) is not None for depth in found)}
    table = Table(
        box=box.SIMPLE_HEAD, title="First blocks kept", title_justify="left", pad_edge=False, collapse_padding=True
    )
    table.add_column("keep", justify="right")
    for name, _ in shown.values():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for depth in found:
        cells = [cell(depth) for _, cell in shown.values()]
        style = "bold" if depth.chosen else None
        table.add_row(str(depth.depth), *cells, "chosen" if depth.chosen else "", style=style)
    return table


def _three_digits(value: float | None) -> str:
    return summary.MISSING if value is None else f"{value:.3f}"


def _bar(part: int | None, whole: int | None) -> str:
    filled = round(BAR * min(part / whole, 1.0)) if part and whole else 0
    return "█" * filled + "░" * (BAR - filled)


def _criterion_table(plan: SlimmingPlan) -> Table:
    """What each criterion would keep of the same encoder, on the same tiles."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="What each criterion would keep",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("criterion")
    table.add_column("blocks", justify="right")
    table.add_column("which", overflow="fold")
    for criterion in summary.criteria(plan):
        which = summary.block_ranges(criterion.kept)
        table.add_row(
            Text(summary.printable(criterion.name)),
            str(len(criterion.kept)),
            which,
            style="bold" if criterion.chosen else None,
        )
    for name in (plan.overview or {}).get("no_answer", {}):
        table.add_row(Text(summary.printable(name)), summary.MISSING, "no answer")
    return table


class _HeatMap:
    """Similarity of all pairs of blocks in per cent; colours where there are any. Nothing if the terminal is too narrow."""

    def __init__(self, similarity: Sequence[Sequence[float]]) -> None:
        self.similarity = similarity

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = len(self.similarity)
        if options.max_width < CELL * (blocks + 1) + 1:
            return
        low = summary.lowest_shown(value for row in self.similarity for value in row)
        yield Text("Similarity of block outputs (CKA in per cent, ** is 99.5 or more)", style="italic")
        yield Text(" " * (CELL + 1) + "".join(f"{number:{CELL}d}" for number in range(blocks)), style="dim")
        for number, row in enumerate(self.similarity):
            line = Text(f"{number:{CELL}d} ", style="dim", no_wrap=True)
            for value in row:
                shown = min(max(value, 0.0), 1.0)
                ink = "#000000" if (shown - low) / (1 - low) > 0.6 else "#ffffff"
                number_shown = f"{100 * shown:.0f}" if shown < 0.995 else "**"
                line.append(f"{number_shown:>{CELL}}", style=f"not dim {ink} on {_viridis((value - low) / (1 - low))}")
            yield line


def _viridis(share: float) -> str:
    from matplotlib import colormaps, colors  # a table without similarity needs no Matplotlib

    return colors.to_hex(colormaps["viridis"](min(max(share, 0.0), 1.0)))
