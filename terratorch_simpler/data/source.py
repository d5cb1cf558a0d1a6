"""What every source of tiles offers, and the count of what it could not use."""

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
pixel holds data; ``index`` list of B ints, each tile's own number; ``position`` list of B ints, its place in the stream of
all shares; further keys are arguments of the encoder."""

NAMED = 5
"""How many unusable tiles are named; the rest is only counted."""

OTHER_BANDS = ("wrong bands", "wrong number of bands")
"""Reasons that masks give that lie beside the images."""

ENOUGH_TO_JUDGE = 4096
"""A stream of millions of tiles need not be read to the end to see that most are damaged."""


class Unusable(NamedTuple):
    """A file or window that cannot be used.

    Attributes:
        path: The file.
        reason: Why, in few words that are counted.
        bad: Whether it is damage, rather than nothing to read.
        detail: What the library that was asked to read it says.
    """

    path: str
    reason: str
    bad: bool
    detail: str = ""


def error_reason(error: OSError) -> str:
    """The counted reason for an error of the operating system."""
    if isinstance(error, FileNotFoundError):
        return "vanished"
    return "permission denied" if isinstance(error, PermissionError) else "unreadable"


class Skip(NamedTuple):
    """Something that could not be used.

    Attributes:
        position: Its place in the stream; -1 for a file that was set aside before.
        reason: Why it could not be used.
        name: Which one.
        bad: Whether it counts towards ``max_bad_fraction``: damage does, missing data does not.
        detail: What the library that was asked to read it says.
    """

    position: int
    reason: str
    name: str
    bad: bool
    detail: str = ""


@dataclass(frozen=True)
class Share:
    """One of several disjoint shares of a stream, for processes that read together.

    Attributes:
        num_shards: Number of shares.
        index: Which of them, from 0.
        block: Neighbours that go to the same share.
        start: First position of the stream that is read at all.
    """

    num_shards: int = 1
    index: int = 0
    block: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        """Refuse a share that does not exist.

        Raises:
            TilesError: If there is no such share.
        """
        if not 0 <= self.index < self.num_shards:
            msg = f"Found shard {self.index} of {self.num_shards}, expected 0 to {self.num_shards - 1}: shards count from 0."
            raise TilesError(msg)

    def positions(self, total: int) -> NDArray[np.int64]:
        """Positions of this share, ascending.

        Args:
            total: Tiles in the whole stream.
        """
        every = np.arange(min(self.start, total), total)
        return every[every // self.block % self.num_shards == self.index] if self.num_shards > 1 else every


class TileSource(Protocol):
    """A finite, seeded, ordered stream of unlabeled tiles.

    Attributes:
        skips: Count of what could not be used in the last pass.
        pin_memory: Whether batches lie in page-locked memory, from which a GPU copies while it computes.
        on_skip: Told what cannot be used, before any tile that comes after it in the stream.
    """

    skips: Skipped
    pin_memory: bool
    on_skip: Callable[[Skip], None] | None

    @property
    def skipped(self) -> dict[str, int]:
        """How many tiles could not be used, by reason."""

    def __len__(self) -> int:
        """Tiles in the stream before any is skipped."""

    def __iter__(self) -> Iterator[Batch]:
        """Stream the tiles from the start."""

    def describe(self) -> dict[str, Any]:
        """What is streamed, by all shares together, with a fingerprint, as it goes to plan.json."""

    def changed(self) -> str:
        """A fingerprint of names, sizes and times of the last change of all files."""

    def shard(self, num_shards: int, index: int, block: int = 1, start: int = 0) -> TileSource:
        """One of several disjoint shares of the same stream (:class:`Share`)."""

    def no_skips(self) -> Skipped:
        """The count of a pass over the whole stream, before it begins."""


class Skipped:
    """Counts what could not be used by reason, names the first few, and stops when it is too much.

    Files that were set aside before the stream and tiles of the stream are judged apart, and the worse of both shares
    counts: a scene that cannot be opened weighs as much as any other scene, not as one of its thousand windows.

    Args:
        planned: Tiles in the stream.
        max_bad_fraction: Share of them, and of the files, that may be unreadable.
        files: Files that were tried before the stream begins.

    Attributes:
        counts: How many by reason.
        named: The first few.
        tried: How many tiles were tried: of a long stream the share is that of these.
    """

    def __init__(self, planned: int, max_bad_fraction: float, files: int = 0) -> None:
        """Start at zero."""
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
        """Count one, in the order of the stream.

        Raises:
            TilesError: If too many were bad.
        """
        self.counts[skip.reason] += 1
        # A file is named once, however many of its windows fail, and missing data does not crowd out damage.
        named = f"{skip.name} ({skip.reason})"
        for names in (self.named, self._bad_named) if skip.bad else (self.named,):
            if len(names) < NAMED and named not in names:
                names.append(named)
        if skip.position >= 0:
            self.tried = skip.position + 1
        if skip.bad:
            self._detail = self._detail or skip.detail
            self._bad_files += skip.position < 0
            self._bad += skip.position >= 0
        self._judge("files", self._bad_files, self._files)
        self._judge("tiles", self._bad, min(self._planned, max(self.tried, ENOUGH_TO_JUDGE)))

    def _judge(self, what: str, bad: int, judged: int) -> None:
        if bad <= self._max_bad_fraction * judged:
            return
        other = any(self.counts[reason] for reason in OTHER_BANDS)
        remedy = (
            "name the images alone by a glob in paths, such as /data/*_image.tif, or remove" if other else "repair or remove"
        )
        detail = f"; the first failed with {self._detail.rstrip('.')}" if self._detail else ""
        msg = (
            f"Found {bad} unreadable of {judged} {what}, expected at most {self._max_bad_fraction:.0%} "
            f"(max_bad_fraction): {remedy} {', '.join(self._bad_named)}{detail}."
        )
        raise TilesError(msg)

    def state(self) -> dict[str, Any]:
        """The counts as plain values, to go on from later."""
        bad = {"bad": self._bad, "bad_files": self._bad_files, "bad_named": [*self._bad_named], "tried": self.tried}
        return {"counts": dict(self.counts), "named": [*self.named], **bad}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take over counts from :meth:`state`."""
        self.counts = Counter(state["counts"])
        self.named, self._bad_named = [*state["named"]], [*state["bad_named"]]
        self._bad, self._bad_files, self.tried = state["bad"], state["bad_files"], state["tried"]

    def __str__(self) -> str:
        """Counts and the first few names in a clause."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        named = [*self._bad_named, *(name for name in self.named if name not in self._bad_named)][:NAMED]
        return f"{counts}; first: {', '.join(named)}"


def fingerprint(parts: Iterable[object]) -> str:
    """Short SHA-256 over what identifies the stream: names and sizes of files, windows, order; no pixels are read."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


class FileStat(NamedTuple):
    """A file as the operating system knows it; size and time are -1 where there is no such local file.

    Attributes:
        name: Its name without the folder, so that copies elsewhere are the same.
        size: Bytes.
        changed: Time of the last change, in whole seconds, which tools that copy files keep.
    """

    name: str
    size: int
    changed: int


def file_stat(path: object) -> FileStat:
    """Look a file up, once; of a part of a file, GDAL's ``/vsisubfile/offset_size,path``, the whole file and which part."""
    part, comma, file = str(path).partition(",") if str(path).startswith("/vsisubfile/") else ("", "", str(path))
    name = f"{part}{comma}{os.path.basename(file)}"
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return FileStat(name, -1, -1)
    return FileStat(name, found.st_size, int(found.st_mtime))
