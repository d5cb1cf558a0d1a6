"""A sweep as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from terratorch_simpler.sweep.rows import Row

SHOWN = {
    "parameters": ("parameters", "{:,}"),
    "macs": ("MACs", "{:,}"),
    "latency_ms": ("ms", "{:.2f}"),
    "throughput": ("tiles/s", "{:.1f}"),
    "peak_memory_mib": ("MiB", "{:.1f}"),
    "similarity": ("similarity", "{:.3f}"),
    "recovery_r2": ("recovered", "{:.3f}"),
    "knn": ("k-NN", "{:.3f}"),
    "linear": ("linear", "{:.3f}"),
    "chosen_by": ("chosen by", "{}"),
}


def sweep_table(rows: Sequence[Row]) -> Table:
    """One line for every way of slimming, and for the small official models below; only columns that say something.

    Args:
        rows: Lines of a sweep.
    """
    shown = [key for key in SHOWN if any(row[key] not in (None, "") for row in rows)]
    table = Table()
    table.add_column("encoder")
    for key in shown:
        table.add_column(SHOWN[key][0], justify="left" if key == "chosen_by" else "right")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and (before["kind"], before["width"]) != (row["kind"], row["width"]):
            table.add_section()
        table.add_row(_name(row), *("" if row[key] is None else SHOWN[key][1].format(row[key]) for key in shown))
    return table


def _name(row: Row) -> str:
    if row["kind"] == "control":
        return str(row["name"])
    blocks = f"blocks {row['kept']}" if row["kept"] != " ".join(map(str, range(row["depth"]))) else f"first {row['depth']}"
    return blocks if row["width"] == 1.0 else f"{blocks}, width {row['width']:g}"
