"""A pass in rounds: every process reads and draws, tells the others, hands over rows, and compares the groups it owns."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from terratorch_simpler.data import Batch, Share, Skip, TileSource
from terratorch_simpler.distributed import Processes
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.extraction.accumulator import SimilarityAccumulator
from terratorch_simpler.extraction.auto_batch import AutoBatch, on_spare_memory
from terratorch_simpler.extraction.groups import END, TILES_PER_GROUP, Group, Groups, TileRef
from terratorch_simpler.extraction.hooks import FeatureExtractor
from terratorch_simpler.extraction.partial_result import PartialResult
from terratorch_simpler.indices import Span


class _Report(NamedTuple):
    """What one process has done in a round."""

    tiles: list[tuple[int, int]]  # position and rows of each
    reached: float
    skips: list[Skip]
    rows_like: tuple[int, int, torch.dtype] | None  # L + 1, D, type
    special: int  # rows of every tile that show no patch
    input_shape: InputShape
    batch_limit: int | None


def _is_shape(value: object) -> bool:
    """Whether it may be the shape of an input, or of each modality."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(part, tuple) and _is_shape(part) for part in value.values())
    return isinstance(value, tuple) and len(value) in (3, 4) and all(type(n) is int and 0 < n <= 2**16 for n in value)


def _position(skip: Skip) -> float:
    return skip.position


class DistributedCollector:
    """The part of one process in a pass over the tiles.

    In a round every process passes the same number of positions of the stream, so none runs ahead of the others and the
    rows that wait do not pile up. What one process has done is told to all before anything is made of it, so all know
    the same, and come to the same end.

    Args:
        source: The tiles, all of them.
        extractor: Draws the rows.
        forward: Sends one batch through the model.
        num_blocks: Blocks of the encoder.
        max_tiles: Tiles after which the pass ends.
        processes: Those that share the tiles.
        partial_result: Where the first process keeps the pass, and goes on from.
        device: Where rows are compared.
        progress: Told the number of tiles so far.
        spans: Ranges of blocks to repair, should they be dropped.

    Attributes:
        similarities: The statistics.
        skips: What could not be used, up to the last group that was judged.
        compared: Number of groups in the pool.
        input_shape: Shape of one input of the encoder.
        batch_limit: Most tiles that fitted into memory at once, if it ran out with more.
    """

    def __init__(
        self,
        source: TileSource,
        extractor: FeatureExtractor,
        forward: Callable[[Batch], object],
        num_blocks: int,
        max_tiles: int,
        processes: Processes,
        partial_result: PartialResult | None,
        device: torch.device,
        progress: Callable[[int], None],
        spans: Sequence[Span] = (),
    ) -> None:
        self.similarities = SimilarityAccumulator(num_blocks, max_tiles // TILES_PER_GROUP + 1, processes, spans)
        self.skips = source.no_skips()
        self.compared = 0
        self.input_shape: InputShape = ()
        self.batch_limit: int | None = None
        self._extractor = extractor
        self._auto_batch = AutoBatch(extractor, forward)
        self._max_tiles = max_tiles
        self._processes = processes
        self._partial_result = partial_result
        self._device = device
        self._progress = progress
        self._groups = Groups(max_tiles)
        self._ends = {0: 0}
        self._like: tuple[int, int, torch.dtype] | None = None
        self._rows: dict[int, Tensor] = {}  # of tiles that this process holds, by position
        self._resume(processes.broadcast_from_zero(self._load))
        start = self._end_of_round = self._ends[self.compared]
        self._reached: float = start
        share = Share(processes.count, processes.rank, TILES_PER_GROUP, start)
        self.source = source.shard(share.num_shards, share.index, share.block, share.start)
        self._positions = share.positions(len(source))
        self._heard: list[Skip] = []  # by this process, not told yet
        self._skips: list[Skip] = []  # of all processes, not judged yet
        self.source.on_skip = self._heard.append

    @property
    def over(self) -> bool:
        """Whether there is nothing more to read."""
        return self._groups.over

    @property
    def width(self) -> int:
        """Width D of a token; 0 before the first one."""
        return 0 if self._like is None else self._like[1]

    @property
    def taken(self) -> int:
        """Usable tiles so far."""
        return self._groups.taken

    def step(self, batches: Iterator[Batch]) -> None:
        """One round.

        Args:
            batches: Those of ``source``, this process's share.
        """
        self._end_of_round += TILES_PER_GROUP * self._processes.count
        reports = self._processes.all_gather(lambda: self._read(batches))
        held = [TileRef(at, process, rows) for process, report in enumerate(reports) for at, rows in report.tiles]
        self._groups.take(held, min(report.reached for report in reports))
        self._skips += [skip for report in reports for skip in report.skips]
        self._skips.sort(key=_position)
        self.input_shape = next((report.input_shape for report in reports if report.input_shape), self.input_shape)
        limits = [report.batch_limit for report in reports if report.batch_limit]
        self.batch_limit = min(limits, default=None)
        groups = list(self._groups.complete())
        self._ends.update({group.number + 1: group.end for group in groups})
        self._like = next((report.rows_like for report in reports if report.rows_like), self._like)
        self.similarities.special = max(report.special for report in reports)
        owned = self._hand_over(groups)
        if groups:
            self._processes.all_gather(lambda: self._compare(owned))
            self.compared = self._groups.count
        self._progress(self.taken)

    def judge(self, count: int) -> None:
        """Count what could not be used up to the end of a group, or to the end of the stream after the last.

        Args:
            count: Number of groups so far.

        Raises:
            TilesError: If too much was unreadable.
        """
        at_end = self._groups.ended and count == self._groups.count
        end = END if at_end else self._ends[count]
        before = bisect_left(self._skips, end, key=_position)
        for skip in self._skips[:before]:
            self.skips.add(skip)
        del self._skips[:before]

    def keep(self, count: int) -> None:
        """Remember the pass up to a group that was judged, should it be ended later.

        Args:
            count: Number of groups so far; the pool shows those of all processes.
        """
        if self._partial_result is not None and self._processes.first:
            state = {"position": self._ends[count], "groups": count, "tiles": self.similarities.tiles(count)}
            with _unless_the_disk_is_full():
                self._partial_result.update(
                    {**state, "skips": self.skips.state(), "input_shape": self.input_shape, **self.similarities.state(count)}
                )

    def save(self) -> None:
        """Write what was remembered: the pass is being ended."""
        if self._partial_result is not None and self._processes.first:
            with _unless_the_disk_is_full():
                self._partial_result.save()

    def _load(self) -> dict[str, Any] | None:
        if self._partial_result is None:
            return None
        like = {"position": 0, "groups": 0, "tiles": 0, "skips": self.skips.state(), "input_shape": None}
        begun = self._partial_result.load({**like, **self.similarities.state(0)})
        adds_up = begun is None or (begun["position"] >= begun["tiles"] > 0 and SimilarityAccumulator.consistent(begun))
        if begun is not None and not (adds_up and _is_shape(begun["input_shape"])):
            self._partial_result.warn_corrupt("sums that do not add up")
            return None
        return begun

    def _resume(self, begun: dict[str, Any] | None) -> None:
        if begun is None:
            return
        self.compared = begun["groups"]
        self._ends[self.compared] = begun["position"]
        self._groups = Groups(self._max_tiles, begun["tiles"], begun["groups"])
        self.skips.resume(begun["skips"])
        self.input_shape = begun["input_shape"]
        if self._processes.first:  # the sums are over all processes
            self.similarities.resume(begun)

    def _read(self, batches: Iterator[Batch]) -> _Report:
        tiles: list[tuple[int, int]] = []
        like = None
        while self._reached < self._end_of_round and self.taken + len(tiles) < self._max_tiles:
            batch = next(batches, None)
            if batch is None:
                self._reached = END
                break
            for position, number, rows in self._rows_of(batch):
                blocks, count, width = rows.shape
                if count:
                    self._rows[position] = rows
                    tiles.append((position, count))
                    like = (blocks, width, rows.dtype)
                else:
                    self._heard.append(Skip(position, "nodata", f"tile {number}", bad=False))
            after = np.searchsorted(self._positions, batch["position"][-1], side="right")
            self._reached = int(self._positions[after]) if after < len(self._positions) else END
            if self._processes.count == 1:
                self._progress(self.taken + len(tiles))
        skips = list(self._heard)
        self._heard.clear()
        return _Report(
            tiles, self._reached, skips, like, self._extractor.special, self._extractor.input_shape, self._auto_batch.limit
        )

    def _rows_of(self, batch: Batch) -> Iterator[tuple[int, int, Tensor]]:
        """Position and number of every tile of a batch, and its rows in every state, (L + 1, rows, D)."""
        places = zip(batch["position"], batch["index"], strict=True)
        for drawn, counts in self._auto_batch.parts(batch):
            for rows in drawn.split(counts, dim=1):
                yield *next(places), rows

    def _compare(self, owned: Sequence[tuple[Group, list[Tensor]]]) -> None:
        for group, rows in owned:

            def compare(device: torch.device, group: Group = group, rows: list[Tensor] = rows) -> None:
                self.similarities.add(group, torch.cat([part.to(device) for part in rows], dim=1))

            on_spare_memory(compare, self._device)

    def _hand_over(self, groups: Sequence[Group]) -> list[tuple[Group, list[Tensor]]]:
        """Bring the rows of every group together in the process that owns it, and return those of this one."""
        rank = self._processes.rank
        everyone = range(self._processes.count)
        moved = [(group.rank, tile) for group in groups for tile in group.tiles if tile.rank != group.rank]
        if moved:
            parcels = [[self._rows.pop(tile.position) for to, tile in moved if (to, tile.rank) == (other, rank)]
                       for other in everyone]  # fmt: skip
            mine = [[tile for to, tile in moved if (to, tile.rank) == (rank, other)] for other in everyone]
            assert self._like is not None  # whoever holds a tile has told
            blocks, width, dtype = self._like
            empty = torch.empty(blocks, 0, width, dtype=dtype)
            got = self._processes.all_to_all(parcels, [sum(tile.rows for tile in tiles) for tiles in mine], empty)
            arrived = [tile for tiles in mine for tile in tiles]
            for tile, rows in zip(arrived, got.split([tile.rows for tile in arrived], dim=1), strict=True):
                self._rows[tile.position] = rows
        return [(group, [self._rows.pop(tile.position) for tile in group.tiles]) for group in groups if group.rank == rank]


class _unless_the_disk_is_full:
    """Keeping a pass is a precaution: that it fails must not end it."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if not isinstance(error, OSError):
            return False
        msg = f"Found no way to keep the unfinished pass ({error}), expected a folder to write to: it goes on without."
        warnings.warn(msg, SimplerWarning, stacklevel=3)
        return True
