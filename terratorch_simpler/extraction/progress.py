"""The progress bar of work on tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(shown: bool, total: int | None, description: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for a while.

    Args:
        shown: False for none.
        total: Number of tiles or steps, if it is known.
        description: What is done.

    Yields:
        A function to be called with their number so far.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)
