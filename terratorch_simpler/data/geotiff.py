"""Unlabeled windows of GeoTIFF and other raster files."""

from __future__ import annotations

import copy
import math
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from datetime import datetime
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terratorch_simpler.data import arguments
from terratorch_simpler.data.buffers import Buffers, Slot, fill_batches
from terratorch_simpler.data.index import SUBDATASETS, TOO_SMALL, Grid, TileIndex, TileWindow, read_headers
from terratorch_simpler.data.paths import find_files
from terratorch_simpler.data.prefetch import Readers, Run, TimedOut
from terratorch_simpler.data.rasters import Header, accept_files_without_georeference, gdal_settings
from terratorch_simpler.data.source import Batch, FileStat, Share, Skip, Skipped, Unusable, file_stat, fingerprint
from terratorch_simpler.data.window import Job, Scaling, Tile, WindowReader
from terratorch_simpler.errors import TilesError

AHEAD_BYTES = 256 * 2**20
"""Pixels that may wait in memory, read but not yet asked for."""
MAX_AHEAD = 512
"""Tiles that may wait, however small."""
WINDOWS_PER_RUN = 8
"""Neighbouring windows that one thread reads in a row: blocks they share are decoded once."""


class GeoTiffTiles:
    """Windows of GeoTIFF and other raster files in a seeded order, as float32 tensors with a mask of valid pixels.

    Windows lie on a grid of ``stride`` in every file, and their order is a permutation of all of them, drawn from
    ``seed``: every prefix of the stream is a uniform sample without replacement. The order does not depend on
    ``batch_size``, ``num_workers`` or shards. A window that lacks data in more than ``max_nodata_fraction`` of its
    pixels, or cannot be read, is skipped and counted in ``skipped``.

    Threads read ahead in an order of their own (windows of a file together, blocks they share decoded once) and at most
    256 MB of tiles, or two batches where these are larger, wait in memory; beside them GDAL keeps decoded blocks
    (``GDAL_CACHEMAX``) and up to 32 files stay open. 16 bytes a window hold the order.

    Names are those of torchgeo where it has them. Unlike its ``RasterDataset``, files need no common CRS or resolution
    and are neither resampled nor merged: an encoder sees pixels, not places.
    Unlike ``GridGeoSampler``, windows stay inside the files, and unlike ``RandomGeoSampler``, no pixel comes twice with
    ``stride >= tile_size``.

    A pixel is valid if it is in every band that is read, by GDAL's masks. An alpha band that is read is data, since GDAL
    declares the fourth band of every 8-bit file one; else it is a mask.

    Args:
        paths: A raster file, a folder (its raster files, subfolders included), a glob, a list (.txt, .lst,
            .csv) with one path a line, a GDAL /vsi path, URL or subdataset, or several of these.
        tile_size: Side of a tile in pixels.
        stride: Step of the grid in pixels; by default ``tile_size``.
        bands: Bands to read, as 1-based numbers or band descriptions; by default all, as many as most files have.
        num_frames: Time steps of a tile; more than one gives (B, C, T, H, W). With ``filename_regex`` each is a file:
            the files of a place, in order of their dates, make up runs of ``num_frames``. Without it the steps are
            stacked in the bands of every file, all bands of a step together.
        nodata: Value that means no data; by default the file's own. NaN, infinities and the file's masks always do.
        max_nodata_fraction: Share of a tile's pixels that may lack data in any band or step.
        scale: Factor on the stored values; "file" for the one written in the file, which TerraTorch's datasets ignore.
        offset: Added after ``scale``; "file" likewise.
        means: Band means of the scaled values, to normalise; by default the datamodule's are used when the callback
            runs.
        stds: Band standard deviations.
        batch_size: Tiles in a batch.
        num_workers: Threads that read; 0 reads in the thread that asks, without ``timeout``.
        max_bad_fraction: Share of the files, and share of the windows, that may be unreadable before it is an error:
            of the windows tried, once these are 4096, else of all.
        seed: Seed of the order.
        pad: "reflect" to mirror files smaller than a tile, where what is added does not count as valid; by default
            they are skipped.
        filename_regex: Pattern that file names must match from their start, with a group ``date``. Files are of one
            place if the rest of their paths is equal, or the group ``tile``, if there is one. Written and matched as in
            torchgeo (``re.VERBOSE``).
        date_format: How the date is written, in the codes of ``strptime``.
        use_metadata: Give ``temporal_coords`` (B, T, 2), year and day of the year from 0, and ``location_coords`` (B, 2),
            latitude and longitude of the centre in degrees, as TerraTorch's datasets do for encoders with time and
            location. Dates are those of the file names, or else of the files' tags.
        timeout: Seconds one read may take before it is given up, and its file with it.
        index_cache: JSON file that keeps sizes and bands of the files for the next time, so that only new or changed
            files are opened. By default none, or ``tiles.json`` in the callback's ``output_dir``.
        pin_memory: Put batches into page-locked memory, if there is an accelerator; the callback does on a GPU.

    Raises:
        TilesError: If no file is found, or an option has no meaning.

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
        """Find the files; they are opened when streaming starts."""
        self.tile_size = arguments.whole_number("tile_size", tile_size, 1)
        self.stride = self.tile_size if stride is None else arguments.whole_number("stride", stride, 1)
        self.bands = None if bands is None else arguments.bands(bands)
        self.num_frames = arguments.whole_number("num_frames", num_frames, 1)
        # NaN is a value that means no data, and the only one that is no number.
        self.nodata = nodata if nodata is None or _is_nan(nodata) else arguments.number("nodata", nodata)
        self.max_nodata_fraction = arguments.share("max_nodata_fraction", max_nodata_fraction)
        self.scale = arguments.scaling("scale", scale)
        self.offset = arguments.scaling("offset", offset)
        self.means = None if means is None else arguments.numbers("means", means)
        self.stds = None if stds is None else arguments.numbers("stds", stds)
        self.batch_size = arguments.whole_number("batch_size", batch_size, 1)
        self.num_workers = arguments.whole_number("num_workers", num_workers, 0)
        self.max_bad_fraction = arguments.share("max_bad_fraction", max_bad_fraction)
        self.seed = arguments.whole_number("seed", seed, 0)
        self.pad = pad
        self.filename_regex = None if filename_regex is None else arguments.text("filename_regex", filename_regex)
        self.date_format = arguments.text("date_format", date_format)
        self.use_metadata = arguments.flag("use_metadata", use_metadata)
        self.timeout = float(arguments.number("timeout", timeout, "seconds above 0"))
        self.index_cache = None if index_cache is None else arguments.path("index_cache", index_cache)
        self.pin_memory = arguments.flag("pin_memory", pin_memory)
        self._check_arguments()
        self.paths, self._left_out = find_files(paths)
        self.skips = Skipped(planned=0, max_bad_fraction=self.max_bad_fraction)
        self.on_skip: Callable[[Skip], None] | None = None
        self._share = Share()
        self._grid: Grid | None = None
        self._unusable: list[Unusable] = []
        self._headers: dict[str, Header] = {}
        self._bands: dict[str, list[int]] = {}
        self._days: dict[str, tuple[int, int]] = {}
        self._stats: list[FileStat] | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """How many files or windows could not be used in the last pass, by reason."""
        return dict(self.skips.counts)

    def __len__(self) -> int:
        """Windows on the grids of all readable files, of this shard if it is one."""
        return len(self._share.positions(len(self._windows())))

    def shard(self, num_shards: int, index: int, block: int = 1, start: int = 0) -> GeoTiffTiles:
        """One of several disjoint shares of the same sequence, for processes that stream together.

        Args:
            num_shards: Number of shares.
            index: Which of them, from 0: of the blocks of the sequence it gets ``index``, ``index + num_shards``, ...
            block: Windows in a block.
            start: Windows at the start of the sequence that no share reads.

        Raises:
            TilesError: If there is no such share.
        """
        share = copy.copy(self)
        share._share = Share(
            arguments.whole_number("num_shards", num_shards, 1),
            arguments.whole_number("index", index, -(2**31)),  # which there are, Share says
            arguments.whole_number("block", block, 1),
            arguments.whole_number("start", start, 0),
        )
        share.skips = Skipped(planned=0, max_bad_fraction=self.max_bad_fraction)
        return share

    def opened(self) -> GeoTiffTiles:
        """These tiles, with all files opened once: what is in them is known from now on, also to copies."""
        self._windows()
        self._stats = [file_stat(path) for path in self.paths]  # anew, should they be used a second time
        return self

    def no_skips(self) -> Skipped:
        """The count of a pass over all windows, before it begins."""
        files = len(self.paths) + sum(unusable.bad for unusable in self._left_out)
        return Skipped(len(self._windows()), self.max_bad_fraction, files)

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
            "tiles": len(self._windows()),
            "fingerprint": fingerprint([*files, settings, self.seed]),
        }

    def changed(self) -> str:
        """A fingerprint of names, sizes and times of the last change of all files."""
        return fingerprint(self._file_stats())

    def _file_stats(self) -> list[FileStat]:
        if self._stats is None:
            self._stats = [file_stat(path) for path in self.paths]
        return self._stats

    def __iter__(self) -> Iterator[Batch]:
        """Stream batches: the keys of :data:`~terratorch_simpler.data.source.Batch`, ``path`` and ``window``.

        Raises:
            TilesError: If too many windows are unreadable, the files yield no window, or storage does not answer.
        """
        grid = self._windows()
        self.skips = self.no_skips()
        if self._share.index == self._share.start == 0:  # files set aside count once, not in every share
            for unusable in (*self._left_out, *self._unusable):
                self._skip(-1, unusable)
        if not len(grid):
            small = (
                "use a smaller tile_size, pad: reflect, or other paths" if self.skips.counts[TOO_SMALL] else "check paths"
            )
            subdatasets = "name one as netcdf:FILE:VARIABLE" if self.skips.counts[SUBDATASETS] else small
            msg = (
                f"Found no window of {self.tile_size} x {self.tile_size} pixels ({self.skips}), expected at least one: "
                f"{subdatasets}."
            )
            raise TilesError(msg)
        buffers = Buffers(self._batch_shape(), self.pin_memory)
        # The traceback of an error keeps generators alive; closing ends the threads all the same.
        with closing(self._read_all(grid, buffers)) as tiles:
            for image, batch in fill_batches(tiles, self.batch_size, buffers.take):
                yield self._collate(image, batch)

    def _check_arguments(self) -> None:
        if not self.timeout > 0:
            msg = f"Found timeout {self.timeout:g}, expected seconds above 0: change timeout."
            raise TilesError(msg)
        means, stds = self.means, self.stds
        if (means is None) != (stds is None) or (means is not None and stds is not None and not 0 < len(means) == len(stds)):
            msg = f"Found means {means} and stds {stds}, expected both with one value a band, or neither: give the other."
            raise TilesError(msg)
        if stds is not None and not all(np.float32(std) > 0 for std in stds):
            msg = f"Found stds {stds}, expected values above 0: change stds."
            raise TilesError(msg)
        if not (self.pad is None or (isinstance(self.pad, str) and self.pad == "reflect")):
            msg = f"Found pad {self.pad!r}, expected reflect or null: change pad."
            raise TilesError(msg)
        self._check_dates()

    def _check_dates(self) -> None:
        if self.filename_regex is None:
            if self.use_metadata and self.num_frames > 1:
                msg = (
                    f"Found use_metadata with {self.num_frames} frames stacked in bands, expected a file a date, since tags "
                    "tell one date only: give filename_regex, or leave use_metadata out."
                )
                raise TilesError(msg)
            return
        try:
            named = re.compile(self.filename_regex, re.VERBOSE).groupindex
        except re.error as err:
            msg = f"Found filename_regex {self.filename_regex!r}, expected a regular expression ({err}): change it."
            raise TilesError(msg) from err
        self._check_date_format()
        if "date" not in named:
            msg = f"Found filename_regex {self.filename_regex!r}, expected a group (?P<date>...): mark the date."
            raise TilesError(msg)

    def _check_date_format(self) -> None:
        try:
            datetime.strptime(datetime(2001, 2, 3).strftime(self.date_format), self.date_format)
        except (ValueError, re.error) as err:
            msg = (
                f"Found date_format {self.date_format!r}, expected codes of strptime, each once ({err}): change date_format."
            )
            raise TilesError(msg) from err

    def _windows(self) -> Grid:
        """The windows of all files; opens each file once, without reading pixels."""
        if self._grid is None:
            accept_files_without_georeference()
            catalogue = TileIndex(self.paths, read_headers(self.paths, self.num_workers, self.timeout, self.index_cache))
            catalogue.choose_bands(self.bands)
            frames = self.num_frames if self.filename_regex else 1
            series, self._days = catalogue.series(frames, self.filename_regex, self.date_format)
            self._grid = catalogue.grid(series, self.tile_size, self.stride, pad=self.pad is not None)
            self._unusable, self._bands, self._headers = catalogue.unusable, catalogue.bands, catalogue.headers
        return self._grid

    def _read_all(self, grid: Grid, buffers: Buffers) -> Generator[Tile, None, None]:
        """Read in the seeded order, a bounded number of windows ahead."""
        accept_files_without_georeference()  # may have been reset since the headers were read
        order = self._order(len(grid))
        positions = self._share.positions(len(grid))
        part = self.batch_size * self._batches_ahead()
        ahead: deque[tuple[list[Job], list[Run[Job, Tile | Unusable]]]] = deque()
        scaling = Scaling(self.scale, self.offset, self.means, self.stds)
        with (
            WindowReader(
                headers=self._headers,
                bands=self._bands,
                num_frames=self.num_frames,
                nodata=self.nodata,
                max_nodata_fraction=self.max_nodata_fraction,
                scaling=scaling,
                days=self._days if self.use_metadata else None,
                timeout=self.timeout,
            ) as windows,
            Readers(
                windows.read, self.num_workers, self.timeout, lambda: gdal_settings(self.timeout), windows.give_up
            ) as readers,
        ):
            for start in range(0, len(positions), part):
                jobs = self._jobs([(p, grid[int(order[p])]) for p in positions[start : start + part].tolist()], buffers)
                ahead.append((jobs, [readers.submit(run) for run in _runs(jobs, self.num_workers)]))
                if len(ahead) > 1:
                    yield from self._in_order(readers, *ahead.popleft())
            while ahead:
                yield from self._in_order(readers, *ahead.popleft())

    def _order(self, windows: int) -> NDArray[np.int64]:
        try:
            return np.random.default_rng(self.seed).permutation(windows)
        except (MemoryError, ValueError) as error:
            msg = f"Found {windows} windows, expected so many that their order fits memory: use a larger stride."
            raise TilesError(msg) from error

    def _jobs(self, places: Sequence[tuple[int, TileWindow]], buffers: Buffers) -> list[Job]:
        size = self.batch_size
        memory = [buffers.take() for _ in range(0, len(places), size)]
        return [Job(at, place, Slot(memory[n // size], n % size)) for n, (at, place) in enumerate(places)]

    def _in_order(
        self, readers: Readers[Job, Tile | Unusable], jobs: list[Job], runs: list[Run[Job, Tile | Unusable]]
    ) -> Iterator[Tile]:
        """Wait for what was read in any order; count what cannot be used."""
        read: dict[int, Tile | Unusable] = {}
        for run in runs:
            for job, tile in zip(run.items, readers.results(run), strict=True):
                read[job.position] = Unusable(str(job), "timed out", True) if isinstance(tile, TimedOut) else tile
        order = [job.position for job in jobs]
        # Whoever holds a job or a run holds its memory.
        jobs.clear()
        runs.clear()
        for position in order:
            tile = read.pop(position)
            if isinstance(tile, Unusable):
                self._skip(position, tile)
            else:
                yield tile

    def _skip(self, position: int, unusable: Unusable) -> None:
        skip = Skip(position, unusable.reason, unusable.path, unusable.bad, unusable.detail)
        self.skips.add(skip)
        if self.on_skip is not None:
            self.on_skip(skip)

    def _batch_shape(self) -> tuple[int, ...]:
        """Shape of a whole batch, (B, C, H, W) or (B, C, T, H, W)."""
        count = len(next(iter(self._bands.values())))
        if not self.filename_regex:
            if count % self.num_frames:
                msg = f"Found {count} bands for {self.num_frames} frames, expected a multiple: change bands or num_frames."
                raise TilesError(msg)
            count //= self.num_frames
        if self.means is not None and len(self.means) not in (count, count * self.num_frames):
            msg = (
                f"Found {count * self.num_frames} bands and {len(self.means)} means, expected one mean a band: change bands "
                "or means."
            )
            raise TilesError(msg)
        frames = (self.num_frames,) if self.num_frames > 1 else ()
        return (self.batch_size, count, *frames, self.tile_size, self.tile_size)

    def _batches_ahead(self) -> int:
        """Batches that are read together while as many wait to be asked for."""
        size = 4 * math.prod(self._batch_shape()[1:])
        return max(1, min(AHEAD_BYTES // size, MAX_AHEAD) // 2 // self.batch_size)

    def _collate(self, image: Tensor, tiles: Sequence[Tile]) -> Batch:
        valid = torch.ones((len(tiles), self.tile_size, self.tile_size), dtype=torch.bool)
        for number, tile in enumerate(tiles):
            if tile.valid is not None:
                valid.numpy()[number] = tile.valid
        places = [tile.place for tile in tiles]
        batch = {
            "image": image,
            "valid": valid,
            "index": [place.number for place in places],
            "position": [tile.position for tile in tiles],
            "path": [place.paths[0] for place in places],
            "window": torch.tensor([[place.column, place.row, place.width, place.height] for place in places]),
        }
        if self.use_metadata:
            batch["temporal_coords"] = torch.tensor([tile.days for tile in tiles], dtype=torch.float32)
            batch["location_coords"] = torch.tensor([tile.location for tile in tiles], dtype=torch.float32)
        return batch


def _is_nan(value: object) -> bool:
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def _runs(jobs: Sequence[Job], num_threads: int) -> Iterator[Sequence[Job]]:
    """Neighbours for one thread each, so few that all threads get some."""
    ordered = sorted(jobs, key=lambda job: (job.place.paths, job.place.row, job.place.column))
    size = min(WINDOWS_PER_RUN, max(1, len(ordered) // max(1, 2 * num_threads)))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))
