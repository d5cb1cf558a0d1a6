"""Threads that read ahead, keep the order, and survive a read that never ends. Knows nothing of rasters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Final, Generic, TypeVar

from terratorch_simpler.errors import TilesError

Item = TypeVar("Item")
Result = TypeVar("Result")

HUNG_AT_ONCE = 8
"""With this many reads that do not end, the storage is gone rather than a file."""
SECONDS_TO_END = 0.8
"""How long closing waits for reads in progress."""
POLL_SECONDS = 0.5


class TimedOut:
    """Stands for the result of a read that took too long."""


TIMED_OUT: Final = TimedOut()


class Run(Generic[Item, Result]):
    """Items that one thread reads one after the other, and what came of them so far."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.results: list[Result | TimedOut] = []
        self.error: BaseException | None = None
        # Not an Event: an interrupt within its wait can become "RuntimeError: release unlocked lock".
        self.ended: SimpleQueue[None] = SimpleQueue()


class Readers(Generic[Item, Result]):
    """Threads that apply a function to runs of items; a context, which they do not outlive.

    Differs from :class:`concurrent.futures.ThreadPoolExecutor` where storage fails: a read that the operating system does
    not end can be neither interrupted nor waited for. Its thread is given up and replaced, its item becomes
    ``TIMED_OUT``, and neither closing nor the end of the process waits for it.

    Args:
        read: Applied to every item, in any thread.
        num_threads: Threads; with 0 the caller's thread reads when results are asked for, without a time limit.
        timeout: Seconds one item may take.
        context: Entered by every thread around its work.
        on_timeout: Told every item that is given up, before anything else of its run is read.
    """

    def __init__(
        self,
        read: Callable[[Item], Result],
        num_threads: int,
        timeout: float,
        context: Callable[[], AbstractContextManager[object]],
        on_timeout: Callable[[Item], None] = lambda _: None,
    ) -> None:
        self._read = read
        self._timeout = timeout
        self._context = context
        self._on_timeout = on_timeout
        self._todo: SimpleQueue[Run[Item, Result] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._stop = False
        self._num_threads = num_threads
        self._threads: list[_Thread[Item, Result]] = []
        self._given_up: list[_Thread[Item, Result]] = []
        self._error: BaseException | None = None

    def __enter__(self) -> Readers[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the threads after the read in progress, and forget what is waiting."""
        self._stop = True
        while True:
            try:
                self._todo.get_nowait()
            except Empty:
                break
        self._todo.put(None)  # handed on from thread to thread
        deadline = time.monotonic() + SECONDS_TO_END
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def submit(self, items: Sequence[Item]) -> Run[Item, Result]:
        """Queue items for one thread."""
        # Only here, where leaving the context ends them whenever an interrupt comes.
        while len(self._threads) < self._num_threads:
            self._threads.append(self._start_thread())
        run: Run[Item, Result] = Run(items)
        if self._threads:
            self._todo.put(run)
        return run

    def results(self, run: Run[Item, Result]) -> list[Result | TimedOut]:
        """Wait for a run.

        Returns:
            One result an item, in order.

        Raises:
            TilesError: If so many reads hang that nothing more can be expected.
            BaseException: What the function raised, or the context of a thread.
        """
        if not self._threads:
            with self._context():
                return [self._read(item) for item in run.items]
        while True:
            try:
                run.ended.get(timeout=min(POLL_SECONDS, self._timeout))
                break
            except Empty:
                if self._error is not None:
                    raise self._error from None
                self._replace_hung()
        if run.error is not None:
            raise run.error
        return run.results

    def _start_thread(self, run: Run[Item, Result] | None = None) -> _Thread[Item, Result]:
        thread = _Thread(self, run)
        try:
            thread.start()
        except RuntimeError as err:
            if isinstance(err.__context__, KeyboardInterrupt):  # start() waits on an Event
                raise err.__context__ from None
            raise
        return thread

    def _work(self, thread: _Thread[Item, Result], run: Run[Item, Result] | None) -> None:
        try:
            with self._context():
                run = run or self._todo.get()
                while run is not None and self._finish(thread, run):
                    run = self._todo.get()
                if run is None:
                    self._todo.put(None)
        except BaseException as err:  # of the context: belongs to whoever waits for anything
            self._error = err

    def _finish(self, thread: _Thread[Item, Result], run: Run[Item, Result]) -> bool:
        """Read what a run lacks; tell whether the thread should go on."""
        while len(run.results) < len(run.items):
            if self._stop:
                return False
            thread.busy_with, thread.busy_since = run, time.monotonic()
            error = None
            try:
                result = self._read(run.items[len(run.results)])
            except BaseException as err:  # belongs to whoever waits for the run
                error = err
            with self._lock:
                if thread.given_up:
                    return False
                thread.busy_with = None
                if error is None:
                    run.results.append(result)
            if error is not None:
                run.error = error
                break
        run.ended.put(None)
        return True

    def _replace_hung(self) -> None:
        late = time.monotonic() - self._timeout
        for number, thread in enumerate(self._threads):
            with self._lock:
                run = thread.busy_with
                if run is None or thread.busy_since > late:
                    continue
                thread.given_up = True
                item = run.items[len(run.results)]
                run.results.append(TIMED_OUT)
            self._on_timeout(item)
            self._given_up = [other for other in (*self._given_up, thread) if other.is_alive()]
            if len(self._given_up) >= HUNG_AT_ONCE:
                msg = (
                    f"Found {len(self._given_up)} reads unfinished after {self._timeout:g} s each, the last of {item}, "
                    "expected storage that answers: check it, or raise timeout."
                )
                raise TilesError(msg)
            self._threads[number] = self._start_thread(run)


class _Thread(threading.Thread, Generic[Item, Result]):
    """A daemon: the process may end while it hangs."""

    def __init__(self, readers: Readers[Item, Result], run: Run[Item, Result] | None) -> None:
        super().__init__(name="tiles", daemon=True)
        self.busy_with: Run[Item, Result] | None = None
        self.busy_since = 0.0
        self.given_up = False
        self._readers = readers
        self._first = run

    def run(self) -> None:
        first, self._first = self._first, None
        self._readers._work(self, first)
