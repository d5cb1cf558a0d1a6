"""Unlabeled windows of GeoTIFF and other raster files."""

from __future__ import annotations

import copy
import math
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from datetime import datetime
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terratorch_simpler.data import arguments
from terratorch_simpler.data.index import SUBDATASETS, TOO_SMALL, Grid, TileIndex, TileWindow, read_headers
from terratorch_simpler.data.paths import find_files
from terratorch_simpler.data.prefetch import Buffer, BufferPool, Chunk, ReaderPool, Slot
from terratorch_simpler.data.rasters import Header, gdal_settings, ignore_missing_georeference
from terratorch_simpler.data.source import Batch, FileStat, Shard, Skip, SkipCounter, file_stat, fingerprint
from terratorch_simpler.data.window import Tile, TileRequest, WindowReader
from terratorch_simpler.errors import TilesError

PREFETCH_BYTES = 256 * 2**20
"""Pixels that are read ahead and wait in memory."""
MAX_PREFETCHED = 512
"""Tiles that are read ahead, however small."""
WINDOWS_PER_CHUNK = 8
"""Neighbouring windows that one thread reads in a row: blocks they share are decoded once."""


class GeoTiffTiles:
    """Windows of GeoTIFF and other raster files in a seeded order, as float32 tensors with a mask of valid pixels.

    Windows lie on a grid of ``stride`` in every file, and their order is a permutation of all of them, drawn from
    ``seed``: every prefix of the stream is a uniform sample without replacement. The order does not depend on
    ``batch_size``, ``num_workers`` or shards. A window that lacks data in more than ``max_nodata_fraction`` of its
    pixels, or cannot be read, is skipped and counted in ``skipped``.

    Threads read ahead in their own order (windows of a file together, so that shared blocks are decoded once). At most
    256 MB of tiles wait in memory, or two batches where these are larger, beside the blocks that GDAL caches
    (``GDAL_CACHEMAX``); up to 32 files stay open. The order takes 16 bytes per window.

    Names follow torchgeo. Unlike its ``RasterDataset``, files need no common CRS or resolution and are neither resampled
    nor merged. Unlike ``GridGeoSampler``, windows stay inside the files, and unlike ``RandomGeoSampler``, no pixel is
    sampled twice with ``stride >= tile_size``.

    A pixel is valid if it is valid in every band that is read, by GDAL's masks. An alpha band that is read is data, since
    GDAL declares the fourth band of every 8-bit file one; otherwise it is a mask.

    Args:
        paths: A raster file, a folder (its raster files, subfolders included), a glob, a list (.txt, .lst,
            .csv) with one path per line, a GDAL /vsi path, URL or subdataset, or several of these.
        tile_size: Side of a tile in pixels.
        stride: Step of the grid in pixels; by default ``tile_size``.
        bands: Bands to read, as 1-based numbers or band descriptions; by default all, as many as most files have.
        num_frames: Time steps of a tile; more than one gives (B, C, T, H, W). With ``filename_regex`` each is a file:
            the files of a place, in order of their dates, make up series of ``num_frames``. Without it the steps are
            stacked in the bands of every file, all bands of a step together.
        nodata: Nodata value; by default the file's own. NaN, infinities and the file's masks always count.
        max_nodata_fraction: Fraction of a tile's pixels that may lack data in any band or step.
        scale: Factor on the stored values; "file" for the one stored in the file, which TerraTorch's datasets ignore.
        offset: Added after ``scale``; "file" likewise.
        means: Band means of the scaled values, to normalize; by default the datamodule's are used when the callback
            runs.
        stds: Band standard deviations.
        batch_size: Tiles in a batch.
        num_workers: Reading threads; with 0 the calling thread reads, without ``timeout``.
        max_bad_fraction: Fraction of the files, and of the windows, that may be unreadable: of the windows tried, once
            these are 4096, else of all.
        seed: Seed of the order.
        pad: "reflect" to mirror files smaller than a tile, where padding does not count as valid; by default they are
            skipped.
        filename_regex: Pattern that file names must match from their start, with a group ``date``. Files are of one
            place if the rest of their paths is equal, or the group ``tile``, if there is one. Written and matched as in
            torchgeo (``re.VERBOSE``).
        date_format: Format of the date, in the codes of ``strptime``.
        use_metadata: Give ``temporal_coords`` (B, T, 2), year and day of the year from 0, and ``location_coords`` (B, 2),
            latitude and longitude of the center in degrees, as TerraTorch's datasets do for encoders with time and
            location. Dates are those of the file names, or else of the files' tags.
        timeout: Seconds one read may take before it is abandoned, and its file with it.
        index_cache: JSON file that caches sizes and bands of the files, so that only new or changed files are opened
            the next time. By default none, or ``tiles.json`` in the callback's ``output_dir``.
        pin_memory: Put batches into page-locked memory, if there is an accelerator; the callback does on a GPU.

    Raises:
        TilesError: If no file is found, or an argument is invalid.

    Example:
        >>> tiles = GeoTiffTiles("/data/scenes", tile_size=224, bands=[1, 2, 3])  # doctest: +SKIP
        >>> for batch in tiles:  # doctest: +SKIP
        ...     batch["image"], batch["valid"]  # float32 (16, 3, 224, 224), bool (16, 224, 224)
    """

    def __init__(
        self,
        paths: str | list[str],
        tile_size: int = 224,
        stride: int | None = None,
        bands: list[int | str] | None = None,
        num_frames: int = 1,
        nodata: float | None = None,
        max_nodata_fraction: float = 0.5,
        scale: float | Literal["file"] = 1.0,
        offset: float | Literal["file"] = 0.0,
        means: list[float] | None = None,
        stds: list[float] | None = None,
        batch_size: int = 16,
        num_workers: int = 4,
        max_bad_fraction: float = 0.1,
        seed: int = 0,
        pad: Literal["reflect"] | None = None,
        filename_regex: str | None = None,
        date_format: str = "%Y%m%d",
        use_metadata: bool = False,
        timeout: float = 60.0,
        index_cache: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.tile_size = arguments.integer("tile_size", tile_size, 1)
        self.stride = self.tile_size if stride is None else arguments.integer("stride", stride, 1)
        self.bands = None if bands is None else arguments.bands(bands)
        self.num_frames = arguments.integer("num_frames", num_frames, 1)
        # NaN is a nodata value, the only one that arguments.number refuses.
        is_nan = isinstance(nodata, float | np.floating) and np.isnan(nodata)
        self.nodata = nodata if nodata is None or is_nan else arguments.number("nodata", nodata)
        self.max_nodata_fraction = arguments.fraction("max_nodata_fraction", max_nodata_fraction)
        self.scale = arguments.scaling("scale", scale)
        self.offset = arguments.scaling("offset", offset)
        self.means = None if means is None else arguments.numbers("means", means)
        self.stds = None if stds is None else arguments.numbers("stds", stds)
        self.batch_size = arguments.integer("batch_size", batch_size, 1)
        self.num_workers = arguments.integer("num_workers", num_workers, 0)
        self.max_bad_fraction = arguments.fraction("max_bad_fraction", max_bad_fraction)
        self.seed = arguments.integer("seed", seed, 0)
        self.pad = pad
        self.filename_regex = None if filename_regex is None else arguments.text("filename_regex", filename_regex)
        self.date_format = arguments.text("date_format", date_format)
        self.use_metadata = arguments.flag("use_metadata", use_metadata)
        self.timeout = float(arguments.number("timeout", timeout, "seconds above 0"))
        self.index_cache = None if index_cache is None else arguments.path("index_cache", index_cache)
        self.pin_memory = arguments.flag("pin_memory", pin_memory)
        self._check_arguments()
        self.paths, self._path_skips = find_files(paths)
        self.skips = SkipCounter(planned=0, max_bad_fraction=self.max_bad_fraction)
        self.on_skip: Callable[[Skip], None] | None = None
        self._shard = Shard()
        self._grid: Grid | None = None
        self._index_skips: list[Skip] = []
        self._headers: dict[str, Header] = {}
        self._bands: dict[str, list[int]] = {}
        self._days: dict[str, tuple[int, int]] = {}
        self._stats: list[FileStat] | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """Files and windows skipped in the last pass, by reason."""
        return dict(self.skips.counts)

    def __len__(self) -> int:
        """Windows of all readable files, of this shard if it is one."""
        return len(self._shard.positions(len(self._open_index())))

    def shard(self, num_shards: int, index: int, block: int = 1, start: int = 0) -> GeoTiffTiles:
        """One of several disjoint shards of the same stream, for processes that read together.

        Args:
            num_shards: Number of shards.
            index: Which of them, from 0: of the blocks of the stream it gets ``index``, ``index + num_shards``, ...
            block: Windows in a block.
            start: Windows at the start of the stream that no shard reads.

        Raises:
            TilesError: If there is no such shard.
        """
        tiles = copy.copy(self)
        tiles._shard = Shard(
            arguments.integer("num_shards", num_shards, 1),
            arguments.integer("index", index, -(2**31)),  # Shard checks the bounds
            arguments.integer("block", block, 1),
            arguments.integer("start", start, 0),
        )
        tiles.skips = SkipCounter(planned=0, max_bad_fraction=self.max_bad_fraction)
        return tiles

    def index_files(self) -> GeoTiffTiles:
        """Index all files, for copies of these tiles as well, and return the tiles."""
        self._open_index()
        self._stats = [file_stat(path) for path in self.paths]  # they may have changed since an earlier use
        return self

    def new_skip_counter(self) -> SkipCounter:
        """A counter at zero for a pass over all windows."""
        files = len(self.paths) + sum(skip.bad for skip in self._path_skips)
        return SkipCounter(len(self._open_index()), self.max_bad_fraction, files)

    def describe(self) -> dict[str, Any]:
        """Kind, number of files and windows, and a fingerprint of names, sizes and settings."""
        settings = (
            *(self.tile_size, self.stride, self.bands, self.num_frames, self.nodata, self.max_nodata_fraction),
            *(self.scale, self.offset, self.means, self.stds, self.pad),
            *(self.filename_regex, self.date_format, self.use_metadata),
        )
        files = ((stat.name, stat.size) for stat in self._file_stats())
        return {
            "source": "GeoTiffTiles",
            "files": len(self.paths),
            "tiles": len(self._open_index()),
            "fingerprint": fingerprint([*files, settings, self.seed]),
        }

    @property
    def band_names(self) -> list[str]:
        """The bands that were asked for; empty if all of them are read."""
        return [str(band) for band in self.bands or []]

    def modification_fingerprint(self) -> str:
        """A fingerprint of names, sizes and modification times of all files."""
        return fingerprint(self._file_stats())

    def _file_stats(self) -> list[FileStat]:
        if self._stats is None:
            self._stats = [file_stat(path) for path in self.paths]
        return self._stats

    def __iter__(self) -> Iterator[Batch]:
        """Stream batches: the keys of :data:`~terratorch_simpler.data.source.Batch`, ``path`` and ``window``.

        Raises:
            TilesError: If too many windows are unreadable, there is no window, or storage does not respond.
        """
        grid = self._open_index()
        self.skips = self.new_skip_counter()
        if self._shard.index == self._shard.start == 0:  # skipped files count once, not in every shard
            for skip in (*self._path_skips, *self._index_skips):
                self._skip(skip)
        if not len(grid):
            remedy = "check paths"
            if self.skips.counts[TOO_SMALL]:
                remedy = "use a smaller tile_size, pad: reflect, or other paths"
            if self.skips.counts[SUBDATASETS]:
                remedy = "name one as netcdf:FILE:VARIABLE"
            size = f"{self.tile_size} x {self.tile_size}"
            raise TilesError(f"No window of {size} pixels ({self.skips}), expected at least one: {remedy}.")
        buffers = BufferPool(self._batch_shape(), self.pin_memory)
        # The traceback of an error keeps generators alive; closing ends the threads all the same.
        with closing(self._read_all(grid, buffers)) as tiles:
            for image, batch in _fill_batches(tiles, self.batch_size, buffers.acquire):
                yield self._collate(image, batch)

    def _check_arguments(self) -> None:
        if not self.timeout > 0:
            raise TilesError(f"timeout is {self.timeout:g}, expected seconds above 0: change timeout.")
        means, stds = self.means, self.stds
        if (means is None) != (stds is None) or (means is not None and stds is not None and not 0 < len(means) == len(stds)):
            msg = f"means are {means} and stds {stds}, expected both with one value per band, or neither: give the other."
            raise TilesError(msg)
        if stds is not None and not all(np.float32(std) > 0 for std in stds):
            raise TilesError(f"stds are {stds}, expected values above 0: change stds.")
        if not (self.pad is None or (isinstance(self.pad, str) and self.pad == "reflect")):
            raise TilesError(f"pad is {self.pad!r}, expected reflect or null: change pad.")
        if self.filename_regex is not None:
            self._check_dates(self.filename_regex)
        elif self.use_metadata and self.num_frames > 1:
            msg = (
                f"use_metadata with {self.num_frames} frames stacked in bands, expected one file per date, since tags hold "
                "one date only: give filename_regex, or leave use_metadata out."
            )
            raise TilesError(msg)

    def _check_dates(self, regex: str) -> None:
        try:
            groups = re.compile(regex, re.VERBOSE).groupindex
        except re.error as err:
            raise TilesError(f"filename_regex is {regex!r}, expected a regular expression ({err}): change it.") from err
        try:
            datetime.strptime(datetime(2001, 2, 3).strftime(self.date_format), self.date_format)
        except (ValueError, re.error) as err:
            msg = f"date_format is {self.date_format!r}, expected codes of strptime, each once ({err}): change date_format."
            raise TilesError(msg) from err
        if "date" not in groups:
            raise TilesError(f"filename_regex is {regex!r}, expected a group (?P<date>...): mark the date.")

    def _open_index(self) -> Grid:
        """The windows of all files; the first call opens each file, without reading pixels."""
        if self._grid is None:
            ignore_missing_georeference()
            index = TileIndex(self.paths, read_headers(self.paths, self.num_workers, self.timeout, self.index_cache))
            index.choose_bands(self.bands)
            frames = self.num_frames if self.filename_regex else 1
            series, self._days = index.series(frames, self.filename_regex, self.date_format)
            self._grid = index.grid(series, self.tile_size, self.stride, pad=self.pad is not None)
            self._index_skips, self._bands, self._headers = index.skips, index.bands, index.headers
        return self._grid

    def _read_all(self, grid: Grid, buffers: BufferPool) -> Generator[Tile, None, None]:
        """Read in the seeded order, a bounded number of windows ahead."""
        ignore_missing_georeference()  # the filter may have been reset since the headers were read
        order = self._order(len(grid))
        positions = self._shard.positions(len(grid))
        part = self.batch_size * self._batches_per_part()
        pending: deque[list[Chunk[TileRequest, Tile | Skip]]] = deque()
        with (
            WindowReader(
                headers=self._headers,
                bands=self._bands,
                days=self._days if self.use_metadata else None,
                num_frames=self.num_frames,
                nodata=self.nodata,
                max_nodata_fraction=self.max_nodata_fraction,
                scale=self.scale,
                offset=self.offset,
                means=self.means,
                stds=self.stds,
                timeout=self.timeout,
            ) as reader,
            ReaderPool(
                reader.read, self.num_workers, self.timeout, lambda: gdal_settings(self.timeout), reader.give_up
            ) as pool,
        ):
            for start in range(0, len(positions), part):
                windows = [(position, grid[int(order[position])]) for position in positions[start : start + part].tolist()]
                # No variable holds the requests: whatever does keeps their memory from being used again.
                pending.append([pool.submit(chunk) for chunk in _chunks(self._requests(windows, buffers), self.num_workers)])
                if len(pending) > 1:
                    yield from self._in_order(pool, pending.popleft())
            while pending:
                yield from self._in_order(pool, pending.popleft())

    def _order(self, windows: int) -> NDArray[np.int64]:
        try:
            return np.random.default_rng(self.seed).permutation(windows)
        except (MemoryError, ValueError) as error:
            raise TilesError(f"The order of {windows} windows does not fit in memory: use a larger stride.") from error

    def _requests(self, windows: Sequence[tuple[int, TileWindow]], buffers: BufferPool) -> list[TileRequest]:
        size = self.batch_size
        memory = [buffers.acquire() for _ in range(0, len(windows), size)]
        return [TileRequest(at, window, Slot(memory[n // size], n % size)) for n, (at, window) in enumerate(windows)]

    def _in_order(
        self, pool: ReaderPool[TileRequest, Tile | Skip], chunks: list[Chunk[TileRequest, Tile | Skip]]
    ) -> Iterator[Tile]:
        """Wait for chunks, which are read in any order, and count their skips."""
        tiles = {tile.position: tile for chunk in chunks for tile in pool.results(chunk)}
        chunks.clear()  # they hold the memory of their tiles
        for position in sorted(tiles):
            tile = tiles.pop(position)
            if isinstance(tile, Skip):
                self._skip(tile)
            else:
                yield tile

    def _skip(self, skip: Skip) -> None:
        self.skips.add(skip)
        if self.on_skip is not None:
            self.on_skip(skip)

    def _batch_shape(self) -> tuple[int, ...]:
        """Shape of a full batch, (B, C, H, W) or (B, C, T, H, W)."""
        count = len(next(iter(self._bands.values())))
        if not self.filename_regex:
            if count % self.num_frames:
                msg = f"{count} bands for {self.num_frames} frames, expected a multiple: change bands or num_frames."
                raise TilesError(msg)
            count //= self.num_frames
        if self.means is not None and len(self.means) not in (count, count * self.num_frames):
            bands = count * self.num_frames
            msg = f"{bands} bands and {len(self.means)} means, expected one mean per band: change bands or means."
            raise TilesError(msg)
        frames = (self.num_frames,) if self.num_frames > 1 else ()
        return (self.batch_size, count, *frames, self.tile_size, self.tile_size)

    def _batches_per_part(self) -> int:
        """Batches that are read together, while the same number waits to be yielded."""
        size = 4 * math.prod(self._batch_shape()[1:])
        return max(1, min(PREFETCH_BYTES // size, MAX_PREFETCHED) // 2 // self.batch_size)

    def _collate(self, image: Tensor, tiles: Sequence[Tile]) -> Batch:
        valid = torch.ones((len(tiles), self.tile_size, self.tile_size), dtype=torch.bool)
        for number, tile in enumerate(tiles):
            if tile.valid is not None:
                valid.numpy()[number] = tile.valid
        windows = [tile.window for tile in tiles]
        batch = {
            "image": image,
            "valid": valid,
            "index": [window.number for window in windows],
            "position": [tile.position for tile in tiles],
            "path": [window.paths[0] for window in windows],
            "window": torch.tensor([[window.column, window.row, window.width, window.height] for window in windows]),
        }
        if self.use_metadata:
            batch["temporal_coords"] = torch.tensor([tile.days for tile in tiles], dtype=torch.float32)
            batch["location_coords"] = torch.tensor([tile.location for tile in tiles], dtype=torch.float32)
        return batch


def _chunks(requests: Sequence[TileRequest], num_threads: int) -> Iterator[Sequence[TileRequest]]:
    """Neighbouring windows for one thread each, in chunks so small that all threads get some."""
    ordered = sorted(requests, key=lambda request: (request.window.paths, request.window.row, request.window.column))
    size = min(WINDOWS_PER_CHUNK, max(1, len(ordered) // max(1, 2 * num_threads)))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def _fill_batches(tiles: Iterable[Tile], size: int, acquire: Callable[[], Buffer]) -> Iterator[tuple[Tensor, list[Tile]]]:
    """Batches (B, ...) with their tiles, in order. Unless one was skipped, tiles are in place already."""
    batch: list[Tile] = []
    target: Buffer | None = None
    for tile in tiles:
        buffer, number = tile.slot
        if target is None:
            target = acquire() if buffer.tainted else buffer
        if (buffer, number) != (target, len(batch)):
            # Never overwrites a tile still to come: whatever was in this slot has moved forward, too.
            target.array[len(batch)] = tile.slot.pixels
        batch.append(tile)
        if len(batch) == size:
            yield target.tensor, batch
            batch, target = [], None
    if target is not None:
        yield target.tensor[: len(batch)], batch
