"""Which tiles are pooled into which group. Known alike in every process, whoever holds the tiles."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

TILES_PER_GROUP = 64
MIN_LAST_GROUP_TILES = 32
"""A last group with fewer tiles than this joins the group before it."""

END = math.inf
"""Position after the last one of a stream."""


class TileRef(NamedTuple):
    """A tile whose rows some process holds."""

    position: int
    rank: int
    rows: int


class Group(NamedTuple):
    """Tiles that are compared together, in stream order.

    Attributes:
        number: Its number in stream order.
        tiles: Its tiles.
        rank: Process that compares them: it holds most of them already.
        end: Position after its last tile.
    """

    number: int
    tiles: Sequence[TileRef]
    rank: int
    end: int


class Groups:
    """Pools the usable tiles of a stream into groups of 64 in stream order.

    Tiles come from several processes, each with a share of the stream. A tile has its place only once every process has
    got beyond it; a group is handed out only when enough tiles of the next one have come, since a last group of fewer than
    ``MIN_LAST_GROUP_TILES`` joins the one before it. So groups are the same however many processes there are.

    Args:
        max_tiles: Tiles after which the stream ends.
        taken: Tiles in groups of an earlier part of the pass.
        number: Groups there were in it.

    Attributes:
        taken: Tiles that have their place.
        count: Groups that were handed out.
        ended: Whether every process has reached the end of the stream.
    """

    def __init__(self, max_tiles: int, taken: int = 0, number: int = 0) -> None:
        self.taken = taken
        self.count = number
        self.ended = False
        self._max_tiles = max_tiles
        self._early: list[TileRef] = []
        self._waiting: list[TileRef] = []

    @property
    def over(self) -> bool:
        """Whether no more tiles are wanted."""
        return self.ended or self.taken >= self._max_tiles

    def take(self, tiles: Sequence[TileRef], reached: float) -> None:
        """Take tiles of any process.

        Args:
            tiles: New tiles, in any order.
            reached: Position that every process has reached; ``END`` when nothing more will come.
        """
        for tile in tiles:
            insort(self._early, tile)
        placed = [tile for tile in self._early if tile.position < reached][: self._max_tiles - self.taken]
        self._early = self._early[len(placed) :]
        self._waiting += placed
        self.taken += len(placed)
        self.ended = reached == END

    def complete(self) -> Iterator[Group]:
        """Hand out the groups that are complete, once; the last one when the stream is over."""
        while len(self._waiting) >= TILES_PER_GROUP + MIN_LAST_GROUP_TILES:
            yield self._hand_out(TILES_PER_GROUP)
        if self.over and self._waiting:
            yield self._hand_out(len(self._waiting))

    def _hand_out(self, size: int) -> Group:
        tiles, self._waiting = self._waiting[:size], self._waiting[size:]
        held = Counter(tile.rank for tile in tiles)
        group = Group(self.count, tiles, min(held, key=lambda rank: (-held[rank], rank)), tiles[-1].position + 1)
        self.count += 1
        return group


def halves(tiles: int) -> list[int]:
    """Sizes of the small groups that the tiles of one group make up, by the same rule as for the groups themselves."""
    half = TILES_PER_GROUP // 2
    return [half, tiles - half] if tiles >= half + MIN_LAST_GROUP_TILES else [tiles]
