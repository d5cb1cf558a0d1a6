"""The interface of a source of tiles, its shards, and the counter of what it skips."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from terratorch_simpler.errors import TilesError

Batch = dict[str, Any]
"""``image`` float32 (B, C, H, W) or (B, C, T, H, W), on the CPU; ``valid`` bool (B, H, W) or (B, T, H, W), True where the
pixel holds data; ``index`` list of B ints, the number of each tile; ``position`` list of B ints, its position in the stream
of all shards; further keys are arguments of the encoder."""

TILE_KEYS = frozenset({"index", "position", "path", "window"})
"""Keys of a batch that describe its tiles."""

MAX_NAMED = 5
"""How many skips are named in messages; all are counted."""

MASK_REASONS = ("wrong bands", "wrong number of bands")
"""Reasons that are typical of label masks in the same folder as the images."""

ENOUGH_TO_JUDGE = 4096
"""``max_bad_fraction`` applies once so many tiles were tried: a stream of millions need not be read to its end."""


class Skip(NamedTuple):
    """A file or tile that is skipped.

    Attributes:
        position: Position of the tile in the stream; -1 for a whole file, skipped before streaming starts.
        reason: Key of ``skipped``.
        name: The file or image.
        bad: Whether it counts towards ``max_bad_fraction``: damage does, missing data does not.
        detail: Error message of the library that read it.
    """

    position: int
    reason: str
    name: str
    bad: bool
    detail: str = ""


@dataclass(frozen=True)
class Shard:
    """One of several disjoint shards of a stream, for processes that read together.

    Attributes:
        num_shards: Number of shards.
        index: Which of them, from 0.
        block: Consecutive positions that go to the same shard.
        start: First position of the stream that any shard reads.

    Raises:
        TilesError: If there is no such shard.
    """

    num_shards: int = 1
    index: int = 0
    block: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.num_shards:
            msg = f"No shard {self.index} of {self.num_shards}, expected 0 to {self.num_shards - 1}: shards count from 0."
            raise TilesError(msg)

    def positions(self, total: int) -> NDArray[np.int64]:
        """Positions of this shard in a stream of ``total`` tiles, ascending."""
        every = np.arange(min(self.start, total), total)
        return every[every // self.block % self.num_shards == self.index] if self.num_shards > 1 else every


class TileSource(Protocol):
    """A finite, seeded, ordered stream of unlabeled tiles.

    Attributes:
        skips: Counter of the last pass.
        pin_memory: Whether batches are in page-locked memory, which a GPU copies from while it computes.
        on_skip: Called for each skip, before any tile of a later position is yielded.
    """

    skips: SkipCounter
    pin_memory: bool
    on_skip: Callable[[Skip], None] | None

    @property
    def skipped(self) -> dict[str, int]:
        """Skips of the last pass by reason."""

    def __len__(self) -> int:
        """Tiles of the stream, including those that will be skipped."""

    def __iter__(self) -> Iterator[Batch]:
        """Stream the tiles from the start."""

    def describe(self) -> dict[str, Any]:
        """The whole stream as recorded in plan.json, with a fingerprint."""

    def modification_fingerprint(self) -> str:
        """A fingerprint of names, sizes and modification times of all files."""

    def shard(self, num_shards: int, index: int, block: int = 1, start: int = 0) -> TileSource:
        """One of several disjoint shards of the same stream (:class:`Shard`)."""

    def new_skip_counter(self) -> SkipCounter:
        """A counter at zero for a pass over the whole stream."""


class SkipCounter:
    """Counts skips by reason, names the first few, and raises once too many are bad.

    Files that were skipped before streaming and tiles of the stream are limited separately: a scene that cannot be opened
    weighs as much as any other scene, not as one of its thousand windows.

    Args:
        planned: Tiles of the stream.
        max_bad_fraction: Fraction of them, and of the files, that may be bad.
        files: Files that were tried before streaming.

    Attributes:
        counts: Skips by reason.
        named: Names and reasons of the first few.
        tried: Tiles tried so far.
    """

    def __init__(self, planned: int, max_bad_fraction: float, files: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.named: list[str] = []
        self.tried = 0
        self._max_bad_fraction = max_bad_fraction
        self._planned = planned
        self._files = files
        self._bad = 0
        self._bad_files = 0
        self._bad_named: list[str] = []
        self._detail = ""

    def add(self, skip: Skip) -> None:
        """Count a skip, in the order of the stream.

        Raises:
            TilesError: If more than ``max_bad_fraction`` are bad.
        """
        self.counts[skip.reason] += 1
        # A file is named once, however many of its windows fail, and missing data does not crowd out damage.
        named = f"{skip.name} ({skip.reason})"
        for names in (self.named, self._bad_named) if skip.bad else (self.named,):
            if len(names) < MAX_NAMED and named not in names:
                names.append(named)
        if skip.position >= 0:
            self.tried = skip.position + 1
        if skip.bad:
            self._detail = self._detail or skip.detail
            self._bad_files += skip.position < 0
            self._bad += skip.position >= 0
        self._check("files", self._bad_files, self._files)
        self._check("tiles", self._bad, min(self._planned, max(self.tried, ENOUGH_TO_JUDGE)))

    def _check(self, what: str, bad: int, total: int) -> None:
        if bad <= self._max_bad_fraction * total:
            return
        masks = any(self.counts[reason] for reason in MASK_REASONS)
        remedy = (
            "name the images alone by a glob in paths, such as /data/*_image.tif, or remove" if masks else "repair or remove"
        )
        detail = f"; the first failed with {self._detail.rstrip('.')}" if self._detail else ""
        msg = (
            f"{bad} of {total} {what} are unreadable, expected at most {self._max_bad_fraction:.0%} (max_bad_fraction): "
            f"{remedy} {', '.join(self._bad_named)}{detail}."
        )
        raise TilesError(msg)

    def state(self) -> dict[str, Any]:
        """The counts as plain values, for :meth:`resume`."""
        bad = {"bad": self._bad, "bad_files": self._bad_files, "bad_named": [*self._bad_named], "tried": self.tried}
        return {"counts": dict(self.counts), "named": [*self.named], **bad}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self.counts = Counter(state["counts"])
        self.named, self._bad_named = [*state["named"]], [*state["bad_named"]]
        self._bad, self._bad_files, self.tried = state["bad"], state["bad_files"], state["tried"]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        named = [*self._bad_named, *(name for name in self.named if name not in self._bad_named)][:MAX_NAMED]
        return f"{counts}; first: {', '.join(named)}"


def fingerprint(parts: Iterable[object]) -> str:
    """First 16 hex digits of a SHA-256 over what identifies a stream: names and sizes of files, settings, order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


class FileStat(NamedTuple):
    """Name, size and modification time of a file; size and time are -1 where there is no such local file.

    Attributes:
        name: Its name without the folder, so that copies elsewhere are the same.
        size: Bytes.
        changed: Modification time in whole seconds, which tools that copy files keep.
    """

    name: str
    size: int
    changed: int


def file_stat(path: object) -> FileStat:
    """Stat a file; for GDAL's ``/vsisubfile/offset_size,path`` the whole file, with the part in the name."""
    part, comma, file = str(path).partition(",") if str(path).startswith("/vsisubfile/") else ("", "", str(path))
    name = f"{part}{comma}{os.path.basename(file)}"
    try:
        stat = os.stat(file)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return FileStat(name, -1, -1)
    return FileStat(name, stat.st_size, int(stat.st_mtime))
