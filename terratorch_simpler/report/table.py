"""A plan in the terminal, and as Markdown for loggers that take text."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary

CELL = 3
"""Columns of a cell of the heat map: a per cent number and a space."""
BAR = 8
GAP = 2
"""Columns between two columns of a table."""
FOLDED = 24
"""Columns that words need at the most: longer ones may be folded."""


class Column(NamedTuple):
    """A column of a :class:`FittedTable`.

    Attributes:
        heading: Its name.
        cells: Text of every row.
        rank: Where the terminal is too narrow for all columns, those of the highest rank are left out first; 0 stays.
        words: Whether cells are words, which are aligned left and folded where nothing else helps, rather than numbers.
    """

    heading: str
    cells: Sequence[str]
    rank: int = 0
    words: bool = False


class FittedTable:
    """A table with as many of its columns as fit the terminal: no cell is cut.

    Args:
        columns: What there is to show.
        title: A line above the table.
        bold: Numbers of the rows that stand out.
        sections: Numbers of the rows above which there is a line.
    """

    def __init__(
        self, columns: Sequence[Column], title: str = "", bold: Collection[int] = (), sections: Collection[int] = ()
    ) -> None:
        self.columns = columns
        self.title = title
        self.bold = bold
        self.sections = sections

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(self.columns)
        while sum(map(_width, columns)) + GAP * (len(columns) - 1) > options.max_width and any(c.rank for c in columns):
            columns.remove(max(columns, key=lambda column: column.rank))
        if self.title:
            yield Text(self.title, style="italic")
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for column in columns:
            table.add_column(
                column.heading, justify="left" if column.words else "right", no_wrap=not column.words, overflow="fold"
            )
        for number, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
            if number in self.sections:
                table.add_section()
            table.add_row(*map(Text, cells), style="bold" if number in self.bold else None)
        yield table
        yield Text()


def _width(column: Column) -> int:
    """Columns of the terminal that a column needs: words may be folded."""
    width = max(map(cell_len, (column.heading, *column.cells)))
    return min(width, FOLDED) if column.words else width


def plan_table(plan: SlimmingPlan) -> Group:
    """Depth, parameters and MACs before and after, and what the choice rests on.

    Args:
        plan: A plan.

    Returns:
        What a rich console prints: the verdict, a heading, a table and a line below it.
    """
    head, *rows = plan_rows(plan)
    columns = [Column(name, cells, 0, not number) for number, (name, *cells) in enumerate(zip(head, *rows, strict=True))]
    why = Text(summary.printable("; ".join(summary.reasons(plan))))
    sets = [_label_set_table(plan)] if summary.label_sets(plan) else []
    return Group(*_verdict(plan), Text(_heading(plan), style="bold"), FittedTable(columns), *sets, why)


def _label_set_table(plan: SlimmingPlan) -> FittedTable:
    """A row for every label set."""
    sets = summary.label_sets(plan)
    cells = zip(*(each.cells(plan.full_num_blocks) for each in sets), strict=True)
    ranks = {"label set": 0, "depth": 0, "score": 0, "verdict": 1, "all blocks": 2, "metric": 3, "constant": 4}
    columns = [
        Column(name, column, ranks[name], name in ("label set", "metric", "verdict"))
        for name, column in zip(summary.LABEL_SET_HEAD, cells, strict=True)
    ]
    return FittedTable(columns, "What each label set asks for", [n for n, each in enumerate(sets) if each.chosen])


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
    rows = [["encoder", "before", "after", "change"]]
    blocks = {"before": plan.full_num_blocks, "after": len(plan.kept_blocks)}
    for name, pair in (("blocks", blocks), ("parameters", plan.parameters), ("MACs per tile", plan.macs)):
        if pair is not None:
            before, after = pair["before"], pair["after"]
            rows.append([name, summary.short(before), summary.short(after), summary.change(after, before)])
    if plan.width != 1:
        rows.insert(2, ["width", "1", f"{plan.width:g}", summary.change(plan.width, 1)])
    return rows


def _depth_table(plan: SlimmingPlan) -> FittedTable:
    """A row for every depth; columns of which nothing is known are left out."""
    found = summary.depths(plan)
    whole = (plan.parameters or {}).get("before") or found[-1].parameters
    known: list[tuple[str, int, str, Callable[[summary.Depth], str]]] = [
        ("score", 1, "score", lambda depth: summary.score(depth.score, depth.error)),
        ("votes", 2, "votes", lambda depth: summary.percent(depth.votes)),
        ("parameters", 3, "parameters", lambda depth: f"{summary.short(depth.parameters)} {_bar(depth.parameters, whole)}"),
        ("macs", 4, "MACs", lambda depth: summary.short(depth.macs)),
        ("similarity", 3, "CKA to last", lambda depth: summary.score(depth.similarity)),
        ("recovery_r2", 5, "R²", lambda depth: summary.score(depth.recovery_r2)),
    ]
    columns = [Column("keep", [str(depth.depth) for depth in found])]
    columns += [
        Column(name, [cell(depth) for depth in found], rank)
        for key, rank, name, cell in known
        if any(getattr(depth, key) is not None for depth in found)
    ]
    same = summary.is_prefix(plan.kept_blocks) and plan.width == 1
    mark = "chosen" if same else "as many blocks as the plan"
    columns.append(Column("", [mark if depth.chosen else "" for depth in found], words=True))
    return FittedTable(columns, "First blocks kept", [number for number, depth in enumerate(found) if depth.chosen])


def _bar(part: int | None, whole: int | None) -> str:
    filled = round(BAR * min(part / whole, 1.0)) if part and whole else 0
    return "█" * filled + "░" * (BAR - filled)


def _criterion_table(plan: SlimmingPlan) -> FittedTable:
    """What each criterion would keep of the same encoder, on the same tiles."""
    rows = [
        (summary.printable(each.name), str(len(each.kept)), summary.block_ranges(each.kept))
        for each in summary.criteria(plan)
    ]
    silent = (plan.overview or {}).get("no_answer", {})
    rows += [(summary.printable(name), summary.MISSING, "no answer") for name in silent]
    names, blocks, which = zip(*rows, strict=True)
    columns = [Column("criterion", names, words=True), Column("blocks", blocks), Column("which", which, words=True)]
    return FittedTable(columns, "What each criterion would keep", bold=[0])


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
