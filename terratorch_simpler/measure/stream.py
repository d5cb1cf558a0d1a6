"""One pass over the tiles: pools what the blocks answer, votes, and stops when a depth has won."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.criteria import Bounds, Criterion, vote
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import TilesError
from terratorch_simpler.measure.borrow import as_pretrained, borrowed
from terratorch_simpler.measure.tap import Tap
from terratorch_simpler.measure.tokens import Tokens
from terratorch_simpler.similarity import GroupedCKA, TileGroups
from terratorch_simpler.tiles import Batch, TileSource

TILES_PER_GROUP = 64
TILES_PER_SMALL_GROUP = 32
GROUPS_TO_TRUST = 8
"""With fewer groups of 64 tiles than this, groups of 32 are used."""
GROUPS_TO_VOTE = 4
"""With fewer groups than this, a bootstrap over groups says nothing."""
SETTLED_SHARE = 0.95
"""Streaming stops once one depth has won this share of resamples."""
FEWEST_TILES = 32
"""Below this there is not even one small group."""


@dataclass(frozen=True)
class Measurement:
    """What a pass over the tiles found.

    Attributes:
        similarity: Similarity S of the blocks, (L, L), float64, on the CPU.
        votes: Share of bootstrap resamples won by each depth, or None with too few groups.
        tiles_seen: Tiles measured.
        rows_seen: Rows of tokens drawn from them.
        settled: Whether the stream was stopped early because one depth had won.
        input_shape: Shape of one input of the encoder as it was seen, without the batch; of each modality by name.
        seconds: How long the pass took.
        data_wait: How many of them the model waited for tiles.
    """

    similarity: Tensor
    votes: Mapping[int, float] | None
    tiles_seen: int
    rows_seen: int
    settled: bool
    input_shape: InputShape
    seconds: float
    data_wait: float


class _Grouping:
    """One way to pool the tiles, and the statistics of its groups."""

    def __init__(self, tiles_per_group: int, num_blocks: int, max_groups: int, device: torch.device) -> None:
        self._groups = TileGroups(tiles_per_group)
        self.metric = GroupedCKA(num_blocks, max_groups, sync_on_compute=False).to(device)
        self.count = 0
        self.tiles = 0

    def add(self, tile: Tensor) -> bool:
        """Take a tile; tell whether it completed a group."""
        return self._update(self._groups.add(tile))

    def finish(self) -> None:
        """Close the last group."""
        self._update(self._groups.finish())

    def _update(self, group: tuple[Tensor, int] | None) -> bool:
        if group is None:
            return False
        features, tiles = group
        self.metric.update(features, tiles, self.count)
        self.metric.check()  # the one wait for the device: once a group, not once a batch
        self.count += 1
        self.tiles += tiles
        return True


class _Pool:
    """Pools tiles in large groups, and in small ones until there are enough large ones."""

    def __init__(self, num_blocks: int, max_tiles: int, device: torch.device) -> None:
        self._large = _Grouping(TILES_PER_GROUP, num_blocks, max_tiles // TILES_PER_GROUP + 1, device)
        self._small = _Grouping(TILES_PER_SMALL_GROUP, num_blocks, 2 * (GROUPS_TO_TRUST + 1), device)

    @property
    def best(self) -> _Grouping:
        """The grouping to believe for the tiles so far."""
        return self._large if self._large.count >= GROUPS_TO_TRUST else self._small

    def add(self, tile: Tensor) -> bool:
        """Take a tile; tell whether the statistics to believe have changed."""
        grown = self._large.add(tile)
        return self._small.add(tile) if self.best is self._small else grown

    def finish(self) -> None:
        """Close the last groups."""
        self._large.finish()
        if self.best is self._small:
            self._small.finish()

    def votes(self, criterion: Criterion, bounds: Bounds, seed: int) -> Mapping[int, float] | None:
        """Bootstrap votes, or None with too few groups."""
        if self.best.count < GROUPS_TO_VOTE:
            return None
        return vote(criterion, self.best.metric.filled(), bounds, seed)


def measure(
    forward: Callable[[Batch], object],
    backbone: SimplerBackbone,
    source: TileSource,
    criterion: Criterion,
    bounds: Bounds,
    *,
    tokens: Tokens = "patch",
    min_tiles: int = 256,
    max_tiles: int = 4096,
    seed: int = 0,
    stop_after: nn.Module | None = None,
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Stream tiles through the encoder and compare the outputs of its blocks.

    Rows are drawn per tile from a seed of its own and pooled into fixed groups of tiles, so the result does not depend
    on the batch size in flight or the number of workers.

    Args:
        forward: Sends one batch of the source through the model, on the model's device.
        backbone: The intact encoder, somewhere inside the model.
        source: The tiles.
        criterion: Rule whose bootstrap votes decide when to stop.
        bounds: Bounds on the kept depth.
        tokens: Which rows are compared: patch tokens, the class token, the mean of the patch tokens, or all tokens.
        min_tiles: Tiles before the stream may stop early.
        max_tiles: Tiles after which it ends.
        seed: Seed of the rows and of the bootstrap.
        stop_after: Module after which the rest of the model need not run; by default the backbone.
        progress: Told the number of tiles measured so far.

    Returns:
        Similarity and votes.

    Raises:
        TilesError: If fewer than 32 tiles could be measured, or they do not fit the encoder.
        DegenerateFeaturesError: If a block's output is constant or not finite.
    """
    stop_after = backbone if stop_after is None else stop_after
    device = next(backbone.parameters()).device
    pool = _Pool(backbone.num_blocks, max_tiles, device)

    def settled() -> bool:
        votes = pool.votes(criterion, bounds, seed) if pool.best.tiles >= min_tiles else None
        return votes is not None and max(votes.values()) >= SETTLED_SHARE

    seen, early = 0, False
    started, waiting = time.perf_counter(), _DataWait(device)
    with (
        borrowed(stop_after, seed),
        as_pretrained(stop_after, backbone),
        Tap(backbone, stop_after, tokens, seed) as tap,
        _stream(source) as batches,
    ):
        # Tile by tile, so that neither max_tiles nor the early stop depends on the batch size in flight.
        for tile in _tiles(waiting.between(batches), tap, forward, source):
            seen += 1
            if progress is not None:
                progress(seen)
            early = pool.add(tile) and settled()
            if early or seen == max_tiles:
                break
    if seen < FEWEST_TILES:
        skips = f" ({source.skips})" if source.skips.counts else ""
        msg = f"Found {seen} usable tiles{skips}, expected at least {FEWEST_TILES} to compare blocks: give more tiles."
        raise TilesError(msg)
    if not early:
        pool.finish()
    metric = pool.best.metric
    similarity = metric.similarity().cpu()  # waits for the device, so that the time below is that of the whole pass
    return Measurement(
        similarity=similarity,
        votes=pool.votes(criterion, bounds, seed),
        tiles_seen=pool.best.tiles,
        rows_seen=int(metric.rows.sum()),
        settled=early,
        input_shape=tap.input_shape,
        seconds=time.perf_counter() - started,
        data_wait=waiting.seconds(),
    )


@contextmanager
def _stream(source: TileSource) -> Iterator[Iterator[Batch]]:
    """Iterate a source, and stop its reading ahead whatever happens."""
    batches = iter(source)
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()


class _DataWait:
    """Adds up how long the model waits for tiles, without waiting for the device itself.

    On a GPU this is the time that passes in its own queue while the next batch is asked for: as long as it computes, none
    does, however long the processor waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def between(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches."""
        while True:
            start = self._now()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._add(start, self._now())
            yield batch

    def seconds(self) -> float:
        """Time so far; the device must have caught up."""
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> None:
        if isinstance(start, float) and isinstance(end, float):
            self._seconds += end - start
        elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((start, end))


def _tiles(batches: Iterator[Batch], tap: Tap, forward: Callable[[Batch], object], source: TileSource) -> Iterator[Tensor]:
    """Rows (L, rows, D) of one tile after the other."""
    for batch in batches:
        features, rows_per_tile = tap.run(forward, batch)
        for tile, number in zip(features.split(rows_per_tile, dim=1), batch["index"], strict=True):
            if tile.shape[1]:
                yield tile
            else:
                source.skips.add("nodata", f"tile {number}")
