"""Tables and picture of docs/evidence.md, made anew from the results that are kept.

    python -m benchmarks.evidence

Text between the tables is written by hand; what stands between ``<!-- results: NAME -->``, or ``<!-- sentences: NAME -->``,
and ``<!-- end -->`` is not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.pretrained_vit.sentences import sentences
from benchmarks.study.picture import draw
from terratorch_simpler.files import atomic_write

PAGE = record.ROOT / "docs" / "evidence.md"
PICTURE = PAGE.with_suffix(".png")
PLACE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SAID = re.compile(r"(<!-- sentences: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
STUDY = "study"
HIDDEN = {"compile": False}
"""Columns that are left out where all lines say this."""


def fill(page: str, results: Path) -> str:
    """The page with every table and every computed sentence as the results say it.

    Args:
        page: Its text.
        results: Folder of the results.

    Raises:
        SystemExit: If a table is asked for whose results are missing.
    """
    page = SAID.sub(lambda place: place[1] + "\n" + sentences(place[2], _read(place[2], results)) + "\n" + place[3], page)
    return PLACE.sub(lambda place: place[1] + table(place[2], results) + place[3], page)


def table(name: str, results: Path) -> str:
    """One table with the command, machine and commit that made it.

    Args:
        name: ``study``, the name of a file without its ending, or that and another of its tables after a slash.
        results: Folder of the results.
    """
    if name == STUDY:
        path = results / STUDY / "tables.md"
        if not path.exists():
            raise SystemExit(f"There is no {path}, expected the study's results: run make study.")
        return path.read_text() + "\n"
    stem, _, part = name.partition("/")
    found = _read(stem, results)
    rows: list[dict[str, Any]] = found[part or "rows"]
    lines = [
        f"{record.place(found['command'], [found])}:",
        "",
        *markdown(rows),
        "",
    ]
    return "\n".join(lines) + "\n"


def _read(stem: str, results: Path) -> dict[str, Any]:
    path = results / f"{stem}.json"
    if not path.exists():
        raise SystemExit(f"There is no {path}, expected the results of a benchmark: run make bench.")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if not all(row.get(column) == HIDDEN.get(column, ...) for row in rows)]
    lines = [f"| {' | '.join(column.replace('_', ' ') for column in columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(record.cell(row.get(column)) for column in columns)} |" for row in rows]


def main() -> None:
    """Write the page and its picture anew."""
    text = fill(PAGE.read_text(), record.RESULTS)
    draw(record.RESULTS / STUDY / "results.csv", PICTURE)
    with atomic_write(PAGE) as part:
        part.write_text(text)
    print(PAGE)


if __name__ == "__main__":
    main()
