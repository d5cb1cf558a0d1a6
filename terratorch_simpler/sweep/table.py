"""A sweep as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from terratorch_simpler.report.summary import block_ranges, is_prefix
from terratorch_simpler.sweep.rows import Row

SHOWN = {
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
"""Heading, unit and format of the columns."""


def sweep_table(rows: Sequence[Row]) -> Table:
    """One line for every way of slimming, and for the small official models below; only columns that say something.

    Args:
        rows: Lines of a sweep.
    """
    shown = [key for key in SHOWN if any(row[key] not in (None, 1.0 if key == "width" else None) for row in rows)]
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("encoder", no_wrap=True)
    for key in shown:
        table.add_column(SHOWN[key][0], justify="right", no_wrap=True)
    table.add_column("chosen by")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and (before["kind"], before["width"]) != (row["kind"], row["width"]):
            table.add_section()
        table.add_row(_name(row), *(_cell(row[key], *SHOWN[key][1:]) for key in shown), row["chosen_by"])
    return table


def _cell(value: float | None, unit: float, shape: str) -> str:
    return "" if value is None else shape.format(value / unit)


def _name(row: Row) -> str:
    if row["kind"] == "control":
        return str(row["name"])
    kept = [int(block) for block in row["kept"].split()]
    return f"first {len(kept)}" if is_prefix(kept) else f"blocks {block_ranges(kept)}"
