"""Memory of batches: tiles are read straight into their slot, and memory nobody holds any more is used again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terratorch_simpler.errors import TilesError


class Buffer:
    """Memory of one batch.

    Attributes:
        tensor: Float32 (B, ...).
        slots: The same memory as an array.
        tainted: Whether a read that was given up may still write here.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.slots: NDArray[np.float32] = tensor.numpy()
        self.tainted = False


class Slot(NamedTuple):
    """Where a tile goes."""

    buffer: Buffer
    number: int

    @property
    def pixels(self) -> NDArray[np.float32]:
        """The tile's memory."""
        pixels: NDArray[np.float32] = self.buffer.slots[self.number]
        return pixels


class Filled(Protocol):
    """A tile that was read into a slot."""

    @property
    def slot(self) -> Slot:
        """Where it was read to."""


Tile = TypeVar("Tile", bound=Filled)


class Buffers:
    """Lends memory for batches. Fresh memory is slow: the operating system clears every page of it first.

    Args:
        shape: Shape of a batch.
        pin_memory: Page-locked memory, which PyTorch itself uses again; like a DataLoader's, it needs an accelerator.
    """

    def __init__(self, shape: tuple[int, ...], pin_memory: bool) -> None:
        self._shape = shape
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._lent: list[tuple[weakref.ref[NDArray[np.float32]], NDArray[np.float32]]] = []

    def take(self) -> Buffer:
        """Memory nobody else uses; it is free again when the last tensor that shares it is gone.

        Raises:
            TilesError: If there is not so much memory.
        """
        if self._pin_memory:
            return Buffer(self._fresh(pin_memory=True))
        # Looked up here rather than by callbacks of the references: an interrupt that falls into one is lost.
        free = next((number for number, (lent, _) in enumerate(self._lent) if lent() is None), None)
        memory = self._fresh().numpy() if free is None else self._lent.pop(free)[1]
        lent = memory[:]  # an object of its own, which lives as long as the tensor's storage
        self._lent.append((weakref.ref(lent), memory))
        return Buffer(torch.from_numpy(lent))

    def _fresh(self, pin_memory: bool = False) -> Tensor:
        # Not np.empty: it asks for huge pages, for which the system has to move others where memory is fragmented.
        try:
            return torch.empty(self._shape, pin_memory=pin_memory)
        except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # beyond 64 bits, PyTorch raises the last two
            shape = " x ".join(map(str, self._shape))
            msg = f"Found no memory for a batch of {shape} pixels, expected one that fits: change tile_size or batch_size."
            raise TilesError(msg) from error


def fill_batches(tiles: Iterable[Tile], size: int, take: Callable[[], Buffer]) -> Iterator[tuple[Tensor, list[Tile]]]:
    """Put tiles side by side, in order. Where none was skipped they are in their places already.

    Args:
        tiles: Tiles that were read, in order of their slots.
        size: Tiles in a batch.
        take: Gives memory if that of the first tile cannot be used.

    Yields:
        A batch (B, ...) and its tiles.
    """
    batch: list[Tile] = []
    target: Buffer | None = None
    for tile in tiles:
        buffer, number = tile.slot
        if target is None:
            target = take() if buffer.tainted else buffer
        if (buffer, number) != (target, len(batch)):
            # Never overwrites a tile still to come: whatever was in this slot has moved forward, too.
            target.slots[len(batch)] = tile.slot.pixels
        batch.append(tile)
        if len(batch) == size:
            yield target.tensor, batch
            batch, target = [], None
    if target is not None:
        yield target.tensor[: len(batch)], batch
