"""Features of all ranks, gathered into groups: each rank reads a share of the tiles and compares a share of the groups."""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from terratorch_simpler.criteria import Bounds, Criterion
from terratorch_simpler.data import Batch, Shard, Skip, TileSource
from terratorch_simpler.distributed import Processes
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.extraction.auto_batch import AutoBatch, float64_device, with_cpu_fallback
from terratorch_simpler.extraction.grouped_similarity import GroupedSimilarity
from terratorch_simpler.extraction.groups import END, TILES_PER_GROUP, Group, GroupPlanner, TileRef
from terratorch_simpler.extraction.hooks import FeatureExtractor
from terratorch_simpler.extraction.input_statistics import InputStatistics
from terratorch_simpler.extraction.partial_result import PartialResult
from terratorch_simpler.extraction.recovery_statistics import RecoveryStatistics, without_special
from terratorch_simpler.extraction.token_sampling import Tokens, TokenSample
from terratorch_simpler.indices import Span

CONVERGED_SHARE = 0.95
"""Streaming stops once this share of the resamples choose one depth."""

_position = attrgetter("position")


@dataclass(frozen=True)
class ExtractionConfig:
    """What a pass over the tiles computes, and when it ends.

    Attributes:
        criterion: Criterion whose bootstrap decides when to stop.
        bounds: Bounds on the kept depth.
        tokens: Which rows are compared: patch tokens, the class token, the mean of the patch tokens, or all tokens.
        min_tiles: Tiles before the pass may stop early.
        max_tiles: Tiles after which it ends.
        seed: Seed of the sampled rows and of the bootstrap.
        spans: Ranges of blocks that may be replaced by a linear map; for patch tokens only, and not together with a
            partial result, which does not save their sums.
    """

    criterion: Criterion
    bounds: Bounds = field(default_factory=Bounds)
    tokens: Tokens = "patch"
    min_tiles: int = 256
    max_tiles: int = 4096
    seed: int = 0
    spans: Sequence[Span] = ()


class _FeatureSpec(NamedTuple):
    """What the features of every tile have in common."""

    num_states: int  # L + 1
    width: int  # D
    dtype: torch.dtype


class _Report(NamedTuple):
    """What one rank has read in a round."""

    tiles: list[tuple[int, int, int | None]]  # position, rows and file of each
    position: float
    skips: list[Skip]
    feature_spec: _FeatureSpec | None  # None if nothing was read
    special_rows: int  # rows of every tile that are class and register tokens
    input_shape: InputShape
    batch_limit: int | None


class DistributedCollector:
    """Reads this rank's shard of the tiles, compares this rank's share of the groups, and stops all ranks at the same group.

    In a round every rank advances by the same number of positions of the stream, so none runs ahead and few features wait
    for others. The ranks exchange what they have read before anything depends on it, so all of them know the same.

    Args:
        extractor: Extracts features of the encoder.
        forward: Sends one batch through the model.
        source: The tiles, all of them.
        config: What to compute.
        input_statistics: Those of the extractor.
        processes: Ranks that share the tiles.
        partial_result: Where rank 0 saves the pass, and resumes it from.
        progress: Called with the number of tiles so far.

    Attributes:
        shard: The tiles of this rank.
        similarity: Similarity over the groups of this rank.
        recovery: Normal equations for ``config.spans``; None without any.
        skips: Tiles that could not be used, up to the last accepted group.
        num_groups: Groups that were compared.
        accepted: Groups that count: those up to the one at which the pass converged.
        tiles_of_file: Accepted tiles of every file; a tile whose file is not known counts as the only one of its file.
        converged: Whether the resamples agree on one depth.
        input_shape: Shape of one input of the encoder.
        batch_limit: Most tiles that fitted into memory at once, if it ran out with more.
    """

    def __init__(
        self,
        extractor: FeatureExtractor[TokenSample],
        forward: Callable[[Batch], object],
        source: TileSource,
        config: ExtractionConfig,
        input_statistics: InputStatistics,
        processes: Processes,
        partial_result: PartialResult | None,
        progress: Callable[[int], None],
    ) -> None:
        backbone = extractor.backbone
        self.similarity = GroupedSimilarity(backbone.num_blocks, config.max_tiles // TILES_PER_GROUP + 1, processes)
        self.recovery = RecoveryStatistics(config.spans, processes) if config.spans else None
        self.skips = source.new_skip_counter()
        self.num_groups = 0
        self.converged = False
        self.input_shape: InputShape = ()
        self.batch_limit: int | None = None
        self._extractor = extractor
        self._auto_batch = AutoBatch(extractor, forward)
        self._config = config
        self._input_statistics = input_statistics
        self._processes = processes
        self._partial_result = partial_result if processes.first else None
        self._device = float64_device(next(backbone.parameters()).device)
        self._progress = progress
        self._planner = GroupPlanner(config.max_tiles)
        self.tiles_of_file: Counter[int] = Counter()
        self._new_files: dict[int, Counter[int]] = {}  # of groups that are not accepted yet
        self._position_after = {0: 0}  # number of groups -> position of the stream to go on from
        self._feature_spec: _FeatureSpec | None = None  # the same on every rank, as is the next one
        self._special_rows = 0
        self._features: dict[int, Tensor] = {}  # of the tiles on this rank, by position
        self._resume(processes.broadcast_from_zero(self._load))
        self.accepted = max(0, self.num_groups - 1)  # a resumed pass may have converged at its last group
        start = self._round_end = self._position_after[self.num_groups]
        self._next_position: float = start
        shard = Shard(processes.count, processes.rank, TILES_PER_GROUP, start)
        self.shard = source.shard(shard.num_shards, shard.index, shard.block, shard.start)
        self._positions = shard.positions(len(source))
        self._new_skips: list[Skip] = []  # of this rank, not reported yet
        self._pending_skips: list[Skip] = []  # of all ranks, after the last accepted group
        self.shard.on_skip = self._new_skips.append

    @property
    def done(self) -> bool:
        """Whether the pass is over: converged, or every group accepted and no more tiles to read."""
        return self.converged or (self.accepted == self.num_groups and self._planner.done)

    @property
    def num_tiles(self) -> int:
        """Usable tiles so far."""
        return self._planner.num_tiles

    @property
    def width(self) -> int:
        """Width D of a token; 0 before the first one."""
        return 0 if self._feature_spec is None else self._feature_spec.width

    def read_round(self, batches: Iterator[Batch]) -> None:
        """Read and compare more tiles; all ranks do so together.

        Args:
            batches: Batches of :attr:`shard`.
        """
        self._round_end += TILES_PER_GROUP * self._processes.count
        reports = self._processes.all_gather(lambda: self._read(batches))
        tiles = [TileRef(tile[0], rank, *tile[1:]) for rank, report in enumerate(reports) for tile in report.tiles]
        self._planner.add(tiles, min(report.position for report in reports))
        self._pending_skips += [skip for report in reports for skip in report.skips]
        self._pending_skips.sort(key=_position)
        self.input_shape = next((report.input_shape for report in reports if report.input_shape), self.input_shape)
        self.batch_limit = min((report.batch_limit for report in reports if report.batch_limit), default=None)
        self._feature_spec = next((report.feature_spec for report in reports if report.feature_spec), self._feature_spec)
        self._special_rows = max(report.special_rows for report in reports)
        groups = list(self._planner.complete())
        self._position_after.update({group.number + 1: group.end for group in groups})
        for group in groups:
            files = (-1 - tile.position if tile.file is None else tile.file for tile in group.tiles)
            self._new_files[group.number] = Counter(files)
        assigned = self._exchange_features(groups)
        if groups:
            self._processes.all_gather(lambda: self._compare(assigned))
            self.num_groups = self._planner.num_groups
        self._progress(self.num_tiles)

    def accept_groups(self) -> None:
        """Accept compared groups one after the other until the resamples agree, however many were compared at once.

        Raises:
            DegenerateFeaturesError: If a block's output is constant or not finite.
            TilesError: If too many tiles were unreadable.
        """
        if self.accepted == self.num_groups:
            return
        config = self._config
        with self.similarity.summed_over_ranks():
            while self.accepted < self.num_groups and not self.converged:
                self.tiles_of_file.update(self._new_files.pop(self.accepted, {}))
                self.accepted += 1
                self.count_skips()
                self.similarity.check(self.accepted)
                if self.similarity.tiles(self.accepted) >= config.min_tiles:
                    shares = self.similarity.bootstrap(self.accepted, config.criterion, config.bounds, config.seed)
                    self.converged = shares is not None and max(shares.values()) >= CONVERGED_SHARE
            end = self._position_after[self.accepted]
            self._input_statistics.count(self._processes.all_gather(lambda: self._input_statistics.take(end)))
            self._update_partial_result()
        if self.recovery is not None:
            self.recovery.accept(self.accepted)

    def count_skips(self) -> None:
        """Count the tiles that could not be used up to the end of the accepted groups, or of the stream after the last.

        Raises:
            TilesError: If too many were unreadable.
        """
        at_end = self._planner.exhausted and self.accepted == self._planner.num_groups
        end = bisect_left(self._pending_skips, END if at_end else self._position_after[self.accepted], key=_position)
        for skip in self._pending_skips[:end]:
            self.skips.add(skip)
        del self._pending_skips[:end]

    def save(self) -> None:
        """Write the partial result: the pass is being interrupted."""
        if self._partial_result is not None:
            with _warn_on_oserror():
                self._partial_result.save()

    def _update_partial_result(self) -> None:
        if self._partial_result is None:
            return
        count = self.accepted
        state = {"position": self._position_after[count], "groups": count, "tiles": self.similarity.tiles(count),
                 "skips": self.skips.state(), "input_shape": self.input_shape,
                 "input_sums": dict(self._input_statistics.sums), "files": dict(self.tiles_of_file)}  # fmt: skip
        with _warn_on_oserror():
            self._partial_result.update({**state, **self.similarity.state(count)})

    def _load(self) -> dict[str, Any] | None:
        if self._partial_result is None:
            return None
        like = {"position": 0, "groups": 0, "tiles": 0, "skips": self.skips.state(), "input_shape": None,
                "input_sums": {}, "files": {}}  # fmt: skip
        state = self._partial_result.load({**like, **self.similarity.state(0)})
        if state is None:
            return None
        consistent = state["position"] >= state["tiles"] > 0 and GroupedSimilarity.is_consistent(state)
        consistent = consistent and _adds_up(state["files"], state["tiles"])
        if not (consistent and _is_input_shape(state["input_shape"]) and _are_input_sums(state["input_sums"])):
            self._partial_result.warn_corrupt("sums that do not add up")
            return None
        return state

    def _resume(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.num_groups = state["groups"]
        self._position_after[self.num_groups] = state["position"]
        self._planner = GroupPlanner(self._config.max_tiles, state["tiles"], state["groups"])
        self.skips.resume(state["skips"])
        self.tiles_of_file = Counter(state["files"])
        self.input_shape = state["input_shape"]
        self._input_statistics.sums = dict(state["input_sums"])
        if self._processes.first:  # the sums are over all ranks
            self.similarity.load_state(state)

    def _read(self, batches: Iterator[Batch]) -> _Report:
        tiles: list[tuple[int, int, int | None]] = []
        spec: _FeatureSpec | None = None
        while self._next_position < self._round_end and self.num_tiles + len(tiles) < self._config.max_tiles:
            batch = next(batches, None)
            if batch is None:
                self._next_position = END
                break
            for position, number, path, features in self._extract(batch):
                states, rows, width = features.shape
                if rows:
                    self._features[position] = features
                    tiles.append((position, rows, None if path is None else _file_number(path)))
                    spec = _FeatureSpec(states, width, features.dtype)
                else:
                    self._new_skips.append(Skip(position, "nodata", f"tile {number}", bad=False))
            following = np.searchsorted(self._positions, batch["position"][-1], side="right")
            self._next_position = int(self._positions[following]) if following < len(self._positions) else END
            if self._processes.count == 1:
                self._progress(self.num_tiles + len(tiles))
        skips = self._new_skips.copy()
        self._new_skips.clear()
        return _Report(
            tiles, self._next_position, skips, spec, self._special_rows, self._extractor.input_shape, self._auto_batch.limit
        )

    def _extract(self, batch: Batch) -> Iterator[tuple[int, int, str | None, Tensor]]:
        """Position, number and file of every tile of a batch, and its features (L + 1, rows, D)."""
        paths = batch.get("path") or [None] * len(batch["index"])
        tiles = zip(batch["position"], batch["index"], paths, strict=True)
        for features, sample in self._auto_batch.parts(batch):
            self._special_rows = sample.special
            for of_tile in features.split(sample.counts, dim=1):
                yield *next(tiles), of_tile

    def _compare(self, assigned: Sequence[tuple[Group, list[Tensor]]]) -> None:
        for group, features in assigned:

            def compare(device: torch.device, group: Group = group, features: list[Tensor] = features) -> None:
                everything = torch.cat([part.to(device) for part in features], dim=1)
                self.similarity.update(*without_special(group, everything, self._special_rows), group.number)
                if self.recovery is not None:
                    self.recovery.add(group, everything, self._special_rows)

            with_cpu_fallback(compare, self._device)

    def _exchange_features(self, groups: Sequence[Group]) -> list[tuple[Group, list[Tensor]]]:
        """Bring the features of every group to the rank that compares it; returns the groups of this rank."""
        rank = self._processes.rank
        moves = [(group.rank, tile) for group in groups for tile in group.tiles if tile.rank != group.rank]
        if moves:
            outgoing: list[list[Tensor]] = [[] for _ in range(self._processes.count)]  # by destination
            incoming: list[list[TileRef]] = [[] for _ in range(self._processes.count)]  # by origin
            for destination, tile in moves:
                if tile.rank == rank:
                    outgoing[destination].append(self._features.pop(tile.position))
                elif destination == rank:
                    incoming[tile.rank].append(tile)
            assert self._feature_spec is not None  # a rank with features has reported it
            empty = torch.empty(self._feature_spec.num_states, 0, self._feature_spec.width, dtype=self._feature_spec.dtype)
            received = self._processes.all_to_all(outgoing, [sum(tile.rows for tile in tiles) for tiles in incoming], empty)
            arrived = [tile for tiles in incoming for tile in tiles]
            for tile, features in zip(arrived, received.split([tile.rows for tile in arrived], dim=1), strict=True):
                self._features[tile.position] = features
        return [
            (group, [self._features.pop(tile.position) for tile in group.tiles]) for group in groups if group.rank == rank
        ]


def _file_number(path: str) -> int:
    """A number of a file that is the same on every rank."""
    return int.from_bytes(hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=7).digest())


def _adds_up(files: dict[object, object], tiles: int) -> bool:
    """Whether so many tiles are counted by file."""
    numbers = [*files, *files.values()]
    return all(type(number) is int for number in numbers) and sum(files.values()) == tiles  # type: ignore[arg-type]


def _is_input_shape(value: object) -> bool:
    """Whether it can be the shape of an input, or of each modality."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(part, tuple) and _is_input_shape(part) for part in value.values())
    return isinstance(value, tuple) and len(value) in (3, 4) and all(type(n) is int and 0 < n <= 2**16 for n in value)


def _are_input_sums(value: dict[object, object]) -> bool:
    """Whether it can be the sums over pixels by modality."""
    return all(
        isinstance(name, str)
        and isinstance(sums, Tensor)
        and sums.ndim == 2
        and len(sums) == 3
        and sums.dtype == torch.double
        for name, sums in value.items()
    )


@contextmanager
def _warn_on_oserror() -> Iterator[None]:
    """Saving a partial result is a precaution: if it fails, the pass continues."""
    try:
        yield
    except OSError as err:
        msg = f"Could not save the partial result ({err}); continuing without it. Check the free space and the folder."
        warnings.warn(msg, SimplerWarning, stacklevel=3)
