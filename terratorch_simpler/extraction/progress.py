"""The progress bar of a pass over tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(shown: bool, total: int | None, name: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for a while.

    Args:
        shown: False for none.
        total: Number of tiles, if it is known.
        name: Name of the encoder.

    Yields:
        A function to be called with the number of tiles so far.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(f"Comparing the blocks of {name}", total=total)
        yield lambda tiles: bar.update(task, completed=tiles)
