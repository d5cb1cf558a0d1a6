"""Threads that read ahead, keep the order and survive reads that never end, and the reused memory they read into."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from queue import Empty, SimpleQueue
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terratorch_simpler.errors import TilesError

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_HUNG = 8
"""With so many reads that do not end, the storage is gone rather than a file."""
JOIN_SECONDS = 0.8
"""How long closing waits for reads in progress."""
POLL_SECONDS = 0.5


class Chunk(Generic[Item, Result]):
    """Items that one thread reads in a row, and their results so far."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.results: list[Result] = []
        self.error: BaseException | None = None
        # Not an Event: an interrupt within its wait can become "RuntimeError: release unlocked lock".
        self.ended: SimpleQueue[None] = SimpleQueue()


class ReaderPool(Generic[Item, Result]):
    """A context manager with threads that apply a function to chunks of items.

    Differs from :class:`concurrent.futures.ThreadPoolExecutor` where storage fails: a read that the operating system does
    not end can be neither interrupted nor waited for. Its thread is abandoned and replaced, and neither closing nor the
    end of the process waits for it.

    Args:
        read: Applied to every item, in any thread.
        num_threads: Threads; with 0, :meth:`results` reads in the caller's thread, without a time limit.
        timeout: Seconds one item may take.
        context: Entered by every thread around its work.
        on_timeout: Gives the result of an item that timed out; called before anything else of its chunk is read.
    """

    def __init__(
        self,
        read: Callable[[Item], Result],
        num_threads: int,
        timeout: float,
        context: Callable[[], AbstractContextManager[object]],
        on_timeout: Callable[[Item], Result],
    ) -> None:
        self._read = read
        self._num_threads = num_threads
        self._timeout = timeout
        self._context = context
        self._on_timeout = on_timeout
        self._queue: SimpleQueue[Chunk[Item, Result] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._stop = False
        self._threads: list[_Thread[Item, Result]] = []
        self._abandoned: list[_Thread[Item, Result]] = []
        self._error: BaseException | None = None

    def __enter__(self) -> ReaderPool[Item, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the threads after their current read, and drop waiting chunks."""
        self._stop = True
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                break
        self._queue.put(None)  # passed on from thread to thread
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def submit(self, items: Sequence[Item]) -> Chunk[Item, Result]:
        """Queue items for one thread."""
        # Threads start here and not in __enter__: wherever an interrupt comes from now on, __exit__ ends them.
        while len(self._threads) < self._num_threads:
            self._threads.append(self._start_thread())
        chunk: Chunk[Item, Result] = Chunk(items)
        if self._threads:
            self._queue.put(chunk)
        return chunk

    def results(self, chunk: Chunk[Item, Result]) -> list[Result]:
        """Wait for a chunk and return one result per item, in order.

        Raises:
            TilesError: If so many reads hang that the storage must be gone.
            BaseException: What the function or the context of a thread raised.
        """
        if not self._threads:
            with self._context():
                return [self._read(item) for item in chunk.items]
        while True:
            try:
                chunk.ended.get(timeout=min(POLL_SECONDS, self._timeout))
                break
            except Empty:
                if self._error is not None:
                    raise self._error from None
                self._replace_hung_threads()
        if chunk.error is not None:
            raise chunk.error
        return chunk.results

    def _start_thread(self, chunk: Chunk[Item, Result] | None = None) -> _Thread[Item, Result]:
        thread = _Thread(self, chunk)
        try:
            thread.start()
        except RuntimeError as err:
            if isinstance(err.__context__, KeyboardInterrupt):  # start() waits on an Event
                raise err.__context__ from None
            raise
        return thread

    def _work(self, thread: _Thread[Item, Result], chunk: Chunk[Item, Result] | None) -> None:
        try:
            with self._context():
                chunk = chunk or self._queue.get()
                while chunk is not None and self._read_chunk(thread, chunk):
                    chunk = self._queue.get()
                if chunk is None:
                    self._queue.put(None)
        except BaseException as err:  # of the context: raised to whoever waits for any chunk
            self._error = err

    def _read_chunk(self, thread: _Thread[Item, Result], chunk: Chunk[Item, Result]) -> bool:
        """Read the remaining items of a chunk; False if the thread has to end."""
        while len(chunk.results) < len(chunk.items):
            if self._stop:
                return False
            thread.reading, thread.started = chunk, time.monotonic()
            error = None
            try:
                result = self._read(chunk.items[len(chunk.results)])
            except BaseException as err:  # raised to whoever waits for the chunk
                error = err
            with self._lock:
                if thread.abandoned:
                    return False
                thread.reading = None
                if error is None:
                    chunk.results.append(result)
            if error is not None:
                chunk.error = error
                break
        chunk.ended.put(None)
        return True

    def _replace_hung_threads(self) -> None:
        late = time.monotonic() - self._timeout
        for number, thread in enumerate(self._threads):
            with self._lock:
                chunk = thread.reading
                if chunk is None or thread.started > late:
                    continue
                thread.abandoned = True
                item = chunk.items[len(chunk.results)]
                chunk.results.append(self._on_timeout(item))
            self._abandoned = [other for other in (*self._abandoned, thread) if other.is_alive()]
            if len(self._abandoned) >= MAX_HUNG:
                msg = (
                    f"{len(self._abandoned)} reads did not finish within {self._timeout:g} s each, the last of {item}: "
                    "check the storage, or raise timeout."
                )
                raise TilesError(msg)
            self._threads[number] = self._start_thread(chunk)


class _Thread(threading.Thread, Generic[Item, Result]):
    def __init__(self, pool: ReaderPool[Item, Result], chunk: Chunk[Item, Result] | None) -> None:
        super().__init__(name="tiles", daemon=True)  # the process may end while it hangs
        self.reading: Chunk[Item, Result] | None = None
        self.started = 0.0
        self.abandoned = False
        self._pool = pool
        self._first = chunk

    def run(self) -> None:
        first, self._first = self._first, None
        self._pool._work(self, first)


class Buffer:
    """Memory of one batch.

    Attributes:
        tensor: Float32 (B, ...).
        array: The same memory as an array.
        tainted: Whether an abandoned read may still write to it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.array: NDArray[np.float32] = tensor.numpy()
        self.tainted = False


class Slot(NamedTuple):
    """Where in a batch a tile is read to."""

    buffer: Buffer
    number: int

    @property
    def pixels(self) -> NDArray[np.float32]:
        """Memory of the tile."""
        pixels: NDArray[np.float32] = self.buffer.array[self.number]
        return pixels


class BufferPool:
    """Memory for batches that is used again: the operating system clears every page of fresh memory, which is slow.

    Args:
        shape: Shape of a batch.
        pin_memory: Allocate page-locked memory, which PyTorch reuses itself; like a DataLoader's, it needs an accelerator.
    """

    def __init__(self, shape: tuple[int, ...], pin_memory: bool) -> None:
        self._shape = shape
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._used: list[tuple[weakref.ref[NDArray[np.float32]], NDArray[np.float32]]] = []

    def acquire(self) -> Buffer:
        """Memory that nothing else uses; it is free again when the last tensor that shares it is gone.

        Raises:
            TilesError: If there is not enough memory.
        """
        if self._pin_memory:
            return Buffer(self._allocate(pin_memory=True))
        # Looked up here rather than by callbacks of the references: an interrupt that falls into one is lost.
        free = next((number for number, (view, _) in enumerate(self._used) if view() is None), None)
        memory = self._allocate().numpy() if free is None else self._used.pop(free)[1]
        view = memory[:]  # an object of its own, which lives as long as the tensor's storage
        self._used.append((weakref.ref(view), memory))
        return Buffer(torch.from_numpy(view))

    def _allocate(self, pin_memory: bool = False) -> Tensor:
        # Not np.empty: it asks for huge pages, for which the system has to move others where memory is fragmented.
        try:
            return torch.empty(self._shape, pin_memory=pin_memory)
        except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # beyond 64 bits, PyTorch raises the last two
            shape = " x ".join(map(str, self._shape))
            msg = f"Not enough memory for a batch of {shape} pixels: reduce tile_size or batch_size."
            raise TilesError(msg) from error
