"""What every source of tiles offers, and the count of what it could not use."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from terratorch_simpler.errors import TilesError

Batch = dict[str, Any]
"""``image`` float32 (B, C, H, W) or (B, C, T, H, W), on the CPU; ``valid`` bool (B, H, W) or (B, T, H, W), True where the
pixel holds data; ``index`` list of B ints, each tile's own number; further keys are arguments of the encoder."""

NAMED = 5
"""How many unusable tiles are named; the rest is only counted."""

ENOUGH_TO_JUDGE = 4096
"""A stream of millions of tiles need not be read to the end to see that most are damaged."""


class TileSource(Protocol):
    """A finite, seeded, ordered stream of unlabeled tiles.

    Attributes:
        skips: Count of what could not be used in the last pass.
        pin_memory: Whether batches lie in page-locked memory, from which a GPU copies while it computes.
    """

    skips: Skipped
    pin_memory: bool

    @property
    def skipped(self) -> dict[str, int]:
        """How many tiles could not be used, by reason."""

    def __len__(self) -> int:
        """Tiles in the stream before any is skipped."""

    def __iter__(self) -> Iterator[Batch]:
        """Stream the tiles from the start."""

    def describe(self) -> dict[str, Any]:
        """What is streamed, with a fingerprint, as it goes to plan.json."""


class Skipped:
    """Counts what could not be used by reason, names the first few, and stops when it is too much.

    Args:
        planned: Tiles in the stream.
        max_bad_fraction: Share of them that may be unreadable.

    Attributes:
        counts: How many by reason.
        named: The first few.
        tried: How many files and tiles were tried, where the source counts them: of a long stream the share is that of
            these.
    """

    def __init__(self, planned: int, max_bad_fraction: float) -> None:
        """Start at zero."""
        self.counts: Counter[str] = Counter()
        self.named: list[str] = []
        self.tried = 0
        self._max_bad_fraction = max_bad_fraction
        self._planned = planned
        self._bad = 0
        self._bad_named: list[str] = []

    def add(self, reason: str, name: str, bad: bool = False) -> None:
        """Count one tile.

        Args:
            reason: Why it could not be used.
            name: Which one.
            bad: Whether it counts towards ``max_bad_fraction``: damage does, missing data does not.

        Raises:
            TilesError: If too many were bad.
        """
        self.counts[reason] += 1
        self._bad += bad
        # A file is named once, however many of its windows fail, and missing data does not crowd out damage.
        for names in (self.named, self._bad_named) if bad else (self.named,):
            if len(names) < NAMED and f"{name} ({reason})" not in names:
                names.append(f"{name} ({reason})")
        judged = min(self._planned, max(self.tried, ENOUGH_TO_JUDGE))
        if self._bad > self._max_bad_fraction * judged:
            msg = (
                f"Found {self._bad} unreadable of {judged} tiles, expected at most {self._max_bad_fraction:.0%} "
                f"(max_bad_fraction): repair or remove {', '.join(self._bad_named)}."
            )
            raise TilesError(msg)

    def __str__(self) -> str:
        """Counts and the first few names in a clause."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        return f"{counts}; first: {', '.join(self.named)}"


def fingerprint(parts: Iterable[object]) -> str:
    """Short SHA-256 over what identifies the stream: names and sizes of files, windows, order; no pixels are read."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:16]


def file_size(path: object) -> int:
    """Size in bytes, or -1 where there is no such local file."""
    try:
        return os.stat(str(path)).st_size
    except OSError:
        return -1
