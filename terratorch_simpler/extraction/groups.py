"""Which tiles form which group: the same on every rank, whichever rank has their features."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from terratorch_simpler.plan import MIN_GROUP_TILES

TILES_PER_GROUP = 64

END = math.inf
"""Position after the last one of a stream."""


class TileRef(NamedTuple):
    """A usable tile.

    Attributes:
        position: Its position in the stream.
        rank: The rank that has its features.
        rows: How many rows they are.
        file: Number of the file that it is a window of, the same on every rank; None if it is the only tile of its file.
    """

    position: int
    rank: int
    rows: int
    file: int | None = None


class Group(NamedTuple):
    """Tiles that are compared together, in stream order.

    Attributes:
        number: Its number in stream order.
        tiles: Its tiles.
        rank: Rank that compares them: it has most of them already.
        end: Position after its last tile.
    """

    number: int
    tiles: Sequence[TileRef]
    rank: int
    end: int


class GroupPlanner:
    """Forms groups of 64 usable tiles in stream order.

    Tiles come from several ranks, each with a share of the stream. The order of a tile is known only once every rank has
    passed its position; a group is complete only once enough tiles of the next one have come, since a last group of fewer
    than ``MIN_GROUP_TILES`` joins the one before it. So groups do not depend on the number of ranks.

    Args:
        max_tiles: Tiles after which the pass ends.
        num_tiles: Tiles in groups of a resumed pass.
        num_groups: Groups of a resumed pass.

    Attributes:
        num_tiles: Tiles whose order is known.
        num_groups: Groups that are complete.
        exhausted: Whether every rank has reached the end of the stream.
    """

    def __init__(self, max_tiles: int, num_tiles: int = 0, num_groups: int = 0) -> None:
        self.num_tiles = num_tiles
        self.num_groups = num_groups
        self.exhausted = False
        self._max_tiles = max_tiles
        self._unordered: list[TileRef] = []
        self._ungrouped: list[TileRef] = []

    @property
    def done(self) -> bool:
        """Whether no more tiles are needed."""
        return self.exhausted or self.num_tiles >= self._max_tiles

    def add(self, tiles: Sequence[TileRef], position: float) -> None:
        """Add tiles of any rank.

        Args:
            tiles: New tiles, in any order.
            position: Position that every rank has reached; ``END`` when nothing more will come.
        """
        for tile in tiles:
            insort(self._unordered, tile)
        ordered = [tile for tile in self._unordered if tile.position < position][: self._max_tiles - self.num_tiles]
        self._unordered = self._unordered[len(ordered) :]
        self._ungrouped += ordered
        self.num_tiles += len(ordered)
        self.exhausted = position == END

    def complete(self) -> Iterator[Group]:
        """Yield the groups that are complete, once each; the last one when the stream is done."""
        while len(self._ungrouped) >= TILES_PER_GROUP + MIN_GROUP_TILES:
            yield self._next_group(TILES_PER_GROUP)
        if self.done and self._ungrouped:
            yield self._next_group(len(self._ungrouped))

    def _next_group(self, size: int) -> Group:
        tiles, self._ungrouped = self._ungrouped[:size], self._ungrouped[size:]
        tiles_of = Counter(tile.rank for tile in tiles)
        rank = min(tiles_of, key=lambda rank: (-tiles_of[rank], rank))
        group = Group(self.num_groups, tiles, rank, tiles[-1].position + 1)
        self.num_groups += 1
        return group


def half_group_sizes(tiles: int) -> list[int]:
    """Sizes of the half groups of a group; a second half that would be too small joins the first one."""
    half = TILES_PER_GROUP // 2
    return [half, tiles - half] if tiles >= half + MIN_GROUP_TILES else [tiles]
