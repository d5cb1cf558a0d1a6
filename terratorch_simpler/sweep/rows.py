"""Rows of a sweep: for sweep.csv, for the page, and as a table in the terminal."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group

from terratorch_simpler.files import atomic_write
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary
from terratorch_simpler.report.summary import block_ranges, is_prefix, printable
from terratorch_simpler.report.table import Column, FittedTable
from terratorch_simpler.sweep.cost import Cost
from terratorch_simpler.sweep.variants import Variant

Row = dict[str, Any]
"""One line by column; None for what was not measured."""

COLUMNS = (
    *("kind", "name", "depth", "width", "kept", "chosen_by"),
    *("parameters", "macs", "latency_ms", "throughput", "batch_size", "peak_memory_mib"),
    *("similarity", "recovery_r2"),
    *("knn", "knn_low", "knn_high", "linear", "linear_low", "linear_high"),
    *("knn_recovered", "linear_recovered"),
    *("knn_gain", "knn_gain_low", "knn_gain_high", "linear_gain", "linear_gain_low", "linear_gain_high"),
)

SCORE = "score_"
"""What comes before the name of a criterion in the columns of scores, one for each that scores depths."""

TERMINAL_COLUMNS: dict[str, tuple[str, int, Callable[[Any], str]]] = {
    "parameters": ("parameters", 1, summary.short),
    "macs": ("MACs", 2, summary.short),
    "latency_ms": ("ms per tile", 4, "{:.2f}".format),
    "throughput": ("tiles/s", 6, "{:.0f}".format),
    "peak_memory_mib": ("MiB", 7, "{:.0f}".format),
    "similarity": ("CKA to last", 5, summary.score),
    "recovery_r2": ("R²", 9, summary.score),
    "knn": ("k-NN", 8, summary.score),
    "linear": ("linear probe", 3, summary.score),
}
"""Heading, rank (the highest is left out first in a narrow terminal) and notation of the columns in the terminal."""
INTERVALS = 100
"""Added to the rank of a probe for its interval."""


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """All columns of some lines: those of every sweep, and the scores of its criteria."""
    return (*COLUMNS, *dict.fromkeys(key for row in rows for key in row if key.startswith(SCORE)))


def row_of_variant(plan: SlimmingPlan, variant: Variant, cost: Cost, probed: Mapping[str, float]) -> Row:
    """A pruned encoder.

    Args:
        plan: The plan of the intact encoder.
        variant: How it was pruned.
        cost: What that costs.
        probed: Columns of the probes; empty if there were none.
    """
    depth = len(variant.kept)
    known = variant.first_blocks and variant.width == 1.0  # what the plan says is about the first blocks at full width
    overview = plan.overview or {}
    of_depth = overview.get("depths") or {}
    criteria = {name: criterion["scores"] or {} for name, criterion in (overview.get("criteria") or {}).items()}
    return {
        **dict.fromkeys(COLUMNS),
        "kind": "slimmed",
        "name": plan.backbone,
        "depth": depth,
        "width": variant.width,
        "kept": " ".join(map(str, variant.kept)),
        "chosen_by": " ".join(variant.chosen_by),
        **cost._asdict(),
        "similarity": plan.similarity[depth - 1][-1] if known and plan.similarity is not None else None,
        "recovery_r2": of_depth.get(depth, {}).get("recovery_r2") if known else None,
        **probed,
        **{f"{SCORE}{name}": scores.get(depth) if known else None for name, scores in criteria.items()},
    }


def row_of_control(name: str, depth: int, cost: Cost) -> Row:
    """A small official model: what it costs, and nothing else, since its weights are random.

    Args:
        name: Its name.
        depth: Its number of blocks.
        cost: What it costs.
    """
    kept = " ".join(map(str, range(depth)))
    about = {"kind": "control", "name": name, "depth": depth, "width": 1.0, "kept": kept, "chosen_by": ""}
    return {**dict.fromkeys(COLUMNS), **about, **cost._asdict()}


def write_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: str | os.PathLike[str]) -> Path:
    """Write lines as CSV, whole or not at all; what is None stays empty.

    Args:
        rows: The lines.
        columns: The columns, in order.
        path: File to write; missing folders are made.
    """
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)


def sweep_table(rows: Sequence[Row]) -> Group:
    """One line for every way of slimming, and for the small official models below; then what each criterion has chosen.

    Args:
        rows: Lines of a sweep.

    Returns:
        What a rich console prints: two tables with only the columns that say something and fit.
    """
    columns = [Column("encoder", [_name(row) for row in rows], words=True)]
    for key, (heading, rank, shown) in TERMINAL_COLUMNS.items():
        if any(row[key] is not None for row in rows):
            columns.append(Column(heading, ["" if row[key] is None else shown(row[key]) for row in rows], rank))
        if any(row.get(f"{key}_low") is not None for row in rows):
            columns.append(Column(f"{heading}, 95 %", [_interval(row, key) for row in rows], rank + INTERVALS))
    groups = [(row["kind"], row["width"]) for row in rows]
    table = FittedTable(
        columns,
        bold=[number for number, row in enumerate(rows) if row["chosen_by"]],
        sections=[number for number in range(1, len(rows)) if groups[number] != groups[number - 1]],
    )
    chosen = sorted((name, _name(row)) for row in rows for name in row["chosen_by"].split())
    if not chosen:
        return Group(table)
    names, kept = zip(*chosen, strict=True)
    return Group(table, FittedTable([Column("criterion", names, words=True), Column("keeps", kept, words=True)]))


def _interval(row: Row, key: str) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "" if low is None or high is None else f"{summary.score(low)} to {summary.score(high)}"


def _name(row: Row) -> str:
    if row["kind"] == "control":
        return printable(row["name"])
    kept = [int(block) for block in row["kept"].split()]
    width = "" if row["width"] == 1.0 else f", width {row['width']:g}"
    return (f"first {len(kept)}" if is_prefix(kept) else f"blocks {block_ranges(kept)}") + width
