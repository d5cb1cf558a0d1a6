"""Rows of a sweep: for sweep.csv, for the page, and as a table in the terminal."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from terratorch_simpler.files import atomic_write
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report.summary import block_ranges, is_prefix
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
)

SCORE = "score_"
"""What comes before the name of a criterion in the columns of scores, one for each that scores depths."""

TERMINAL_COLUMNS = {
    "width": ("width", 1, "{:g}"),
    "parameters": ("M par.", 1e6, "{:.2f}"),
    "macs": ("GMACs", 1e9, "{:.3f}"),
    "latency_ms": ("ms", 1, "{:.2f}"),
    "throughput": ("tiles/s", 1, "{:.0f}"),
    "peak_memory_mib": ("MiB", 1, "{:.0f}"),
    "similarity": ("CKA", 1, "{:.3f}"),
    "recovery_r2": ("R2", 1, "{:.3f}"),
    "knn": ("k-NN", 1, "{:.3f}"),
    "linear": ("linear", 1, "{:.3f}"),
}
"""Heading, unit and format of the columns in the terminal."""


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """All columns of some lines: those of every sweep, and the scores of its criteria."""
    return (*COLUMNS, *dict.fromkeys(key for row in rows for key in row if key.startswith(SCORE)))


def row_of_variant(plan: SlimmingPlan, variant: Variant, cost: Cost, probed: Mapping[str, float]) -> Row:
    """A slimmed encoder.

    Args:
        plan: The plan of the intact encoder.
        variant: How it was slimmed.
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


def sweep_table(rows: Sequence[Row]) -> Table:
    """One line for every way of slimming, and for the small official models below; only columns that say something.

    Args:
        rows: Lines of a sweep.
    """
    shown = [key for key in TERMINAL_COLUMNS if any(row[key] not in (None, 1.0 if key == "width" else None) for row in rows)]
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("encoder", no_wrap=True)
    for key in shown:
        table.add_column(TERMINAL_COLUMNS[key][0], justify="right", no_wrap=True)
    table.add_column("chosen by")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and (before["kind"], before["width"]) != (row["kind"], row["width"]):
            table.add_section()
        table.add_row(_name(row), *(_cell(row[key], *TERMINAL_COLUMNS[key][1:]) for key in shown), row["chosen_by"])
    return table


def _cell(value: float | None, unit: float, shape: str) -> str:
    return "" if value is None else shape.format(value / unit)


def _name(row: Row) -> str:
    if row["kind"] == "control":
        return str(row["name"])
    kept = [int(block) for block in row["kept"].split()]
    return f"first {len(kept)}" if is_prefix(kept) else f"blocks {block_ranges(kept)}"
