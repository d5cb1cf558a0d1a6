"""The progress bar of whatever takes a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(
    shown: bool, total: int | None, description: str, *, thread: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for a while, in a terminal or a notebook; a log file gets none.

    Args:
        shown: False for none.
        total: Number of tiles or steps, if it is known.
        description: What is done.
        thread: Whether a thread draws it; without, it is drawn when the number changes, which leaves alone what is timed.

    Yields:
        A function to be called with their number so far.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    seen = get_console().is_terminal or get_console().is_jupyter
    with Progress(*columns, auto_refresh=thread, disable=not (shown and seen)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done, refresh=not thread)
