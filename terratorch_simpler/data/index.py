"""Indexes files without reading a pixel: headers and their cache, bands, dates, and from these the grid of all windows."""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from rasterio.windows import Window
from torchgeo.datasets.utils import disambiguate_timestamp

from terratorch_simpler.data.failures import skip_for
from terratorch_simpler.data.paths import GEOTIFF_ENDINGS, is_remote
from terratorch_simpler.data.prefetch import ReaderPool
from terratorch_simpler.data.rasters import Header, Raster, gdal_settings
from terratorch_simpler.data.source import Skip
from terratorch_simpler.errors import ConfigurationError, SimplerWarning, TilesError
from terratorch_simpler.files import atomic_write, check_folder

MANY_PIXELS_PER_BYTE = 2**10
"""No compression packs blocks of differing pixels so well: the file is nearly empty, or its header is damaged."""
MAX_TAGS = 4096
STRIP_OFFSETS, ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS = 273, 278, 322, 323, 324
SHORT = 3
"""Tags and a type of TIFF."""

CACHE_FORMAT = "terratorch-simpler/tile-index"
CACHE_VERSION = 1
CACHE_START = 100
"""Characters in which a file names its format: no file of another format is overwritten."""

FILES_PER_CHUNK = 32

SIDECARS = (".aux.xml", ".msk", ".ovr")
"""Endings of the files in which GDAL keeps more of a raster beside it."""

MAX_WINDOWS = 2**28
"""Windows of one file: more means a damaged header or a mistaken stride. Their order takes 4 GB."""

TOO_SMALL = "smaller than tile_size"
SUBDATASETS = "subdatasets"
"""A container of several images, of which none is named."""


class TileWindow(NamedTuple):
    """A window: its number in the grid of all windows, its files (one per time step), and its pixels."""

    number: int
    paths: tuple[str, ...]
    column: int
    row: int
    width: int
    height: int


class Grid:
    """All windows of all series of files, numbered series by series, row by row.

    A sequence that stores one entry per series, not one per window: a thousand scenes have millions of windows.

    Args:
        series: Files of one place, one per time step.
        sizes: Width and height of each series in pixels.
        tile_size: Side of a window in pixels.
        stride: Step of the grid in pixels.
    """

    def __init__(
        self, series: Sequence[tuple[str, ...]], sizes: Sequence[tuple[int, int]], tile_size: int, stride: int
    ) -> None:
        self._tile_size = tile_size
        self._stride = stride
        self._series = series
        self._sizes = sizes
        # A side shorter than a tile has one window: TileIndex.grid decides whether it is padded or skipped.
        self._columns = [max(0, width - tile_size) // stride + 1 for width, _ in sizes]
        rows = [max(0, height - tile_size) // stride + 1 for _, height in sizes]
        self._ends = list(accumulate(c * r for c, r in zip(self._columns, rows, strict=True)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> TileWindow:
        if not 0 <= number < len(self):
            raise IndexError(number)
        at = bisect_right(self._ends, number)
        row, column = divmod(number - (self._ends[at - 1] if at else 0), self._columns[at])
        (width, height), side, stride = self._sizes[at], self._tile_size, self._stride
        return TileWindow(number, self._series[at], column * stride, row * stride, min(side, width), min(side, height))


class TileIndex:
    """The headers of all files, and the skips of those that cannot be used.

    Args:
        paths: Files.
        headers: Their headers, or why there is none.

    Attributes:
        skips: Skipped files.
        headers: Headers of the other files.
        bands: Bands to read of each, from 1.
    """

    def __init__(self, paths: Sequence[str], headers: Sequence[Header | Skip]) -> None:
        self.skips = [header for header in headers if isinstance(header, Skip)]
        self.headers = {path: header for path, header in zip(paths, headers, strict=True) if isinstance(header, Header)}
        self.bands: dict[str, list[int]] = {}

    def choose_bands(self, bands: Sequence[int | str] | None) -> None:
        """Look up the bands in every file; files without them are skipped.

        Args:
            bands: Numbers from 1 or descriptions; None for all, as many as most files have.

        Raises:
            TilesError: If no file has the bands.
        """
        counts = Counter(header.num_bands for header in self.headers.values() if header.real and header.num_bands)
        # Most files, and of equally many those with more bands: masks have fewer than the images beside them.
        most = max(counts, key=lambda count: (counts[count], count), default=0)
        described = any(isinstance(band, str) for band in bands or ())
        error = None
        for path, header in self.headers.items():
            if not header.num_bands:
                self._skip(path, SUBDATASETS, bad=False)
            elif not header.real:
                self._skip(path, "complex numbers")
            elif described and header.descriptions is None:
                self._skip(path, "unreadable")
            elif bands is None:
                self.bands[path] = list(range(1, header.num_bands + 1))
                if header.num_bands != most:
                    self._skip(path, "wrong number of bands")
            else:
                known = header.descriptions or ()
                indexes = [known.index(b) + 1 if b in known else 0 if isinstance(b, str) else b for b in bands]
                self.bands[path] = indexes
                wrong = [band for band, index in zip(bands, indexes, strict=True) if not 1 <= index <= header.num_bands]
                if wrong:
                    named = [description for description in known if description]
                    error = error or (
                        f"No band {wrong[0]!r} in {path}, expected 1 to {header.num_bands} or one of {named}: change bands."
                    )
                    self._skip(path, "wrong bands")
        self._drop_skipped()
        if error and not self.headers:
            raise TilesError(error)

    def series(
        self, num_frames: int, filename_regex: str | None, date_format: str
    ) -> tuple[list[tuple[str, ...]], dict[str, tuple[int, int]]]:
        """Group files of one place into series of ``num_frames`` dates.

        Args:
            num_frames: Files in a series.
            filename_regex: Pattern with a group ``date``, and perhaps ``tile``; None if every file is a series by itself.
            date_format: Format of the date.

        Returns:
            Series, each in order of the dates, and (year, day of the year from 0) of every file with a date.
        """
        if filename_regex is None:
            return [(path,) for path in self.headers], {}
        pattern = re.compile(filename_regex, re.VERBOSE)
        dated: dict[object, dict[datetime, str]] = {}
        days: dict[str, tuple[int, int]] = {}
        for path in self.headers:
            folder, name = os.path.split(path)
            match = pattern.match(name)
            try:
                date = match["date"] if match else None
                moment = disambiguate_timestamp(date, date_format)[0] if date else None
            except ValueError:
                moment = None
            if match is None or date is None or moment is None:
                self._skip(path, "name without a date", bad=False)
                continue
            days[path] = (moment.year, moment.timetuple().tm_yday - 1)
            start, end = match.span("date")
            place = match.groupdict().get("tile") or (folder.replace(date, ""), name[:start] + name[end:])
            if dated.setdefault(place, {}).setdefault(moment, path) != path:  # a band by itself, or processed again
                del days[path]
                self._skip(path, "same place and date as another file", bad=False)
        self._drop_skipped()
        series = []
        for files in dated.values():
            ordered = [files[moment] for moment in sorted(files)]
            for start in range(0, len(ordered), num_frames):
                frames = tuple(ordered[start : start + num_frames])
                if len(frames) < num_frames:
                    self._skip_all(frames, "too few dates", bad=False)
                elif len({self._size(path) for path in frames}) > 1:
                    self._skip_all(frames, "dates of unequal size", bad=True)
                else:
                    series.append(frames)
        return series, days

    def grid(self, series: Sequence[tuple[str, ...]], tile_size: int, stride: int, pad: bool) -> Grid:
        """The windows of all series; series smaller than a tile are skipped unless they are padded."""
        usable = []
        for frames in series:
            width, height = self._size(frames[0])
            if not pad and min(width, height) < tile_size:
                self._skip_all(frames, TOO_SMALL, bad=False)
            elif len(Grid([frames], [(width, height)], tile_size, stride)) > MAX_WINDOWS:
                self._skip_all(frames, "too many windows", bad=True)
            else:
                usable.append(frames)
        return Grid(usable, [self._size(frames[0]) for frames in usable], tile_size, stride)

    def _size(self, path: str) -> tuple[int, int]:
        return self.headers[path].width, self.headers[path].height

    def _skip_all(self, paths: Iterable[str], reason: str, bad: bool) -> None:
        self.skips.extend(Skip(-1, reason, path, bad) for path in paths)

    def _skip(self, path: str, reason: str, bad: bool = True) -> None:
        self._skip_all([path], reason, bad)
        self.bands.pop(path, None)

    def _drop_skipped(self) -> None:
        skipped = {skip.name for skip in self.skips}
        self.headers = {path: header for path, header in self.headers.items() if path not in skipped}


def read_headers(paths: Sequence[str], num_threads: int, timeout: float, cache: str | None) -> list[Header | Skip]:
    """Open every file once, in parallel, unless it is unchanged since it was cached.

    Args:
        paths: Files.
        num_threads: Threads that open files.
        timeout: Seconds one file may take.
        cache: JSON file to read headers from and write them to; remote files are not cached, since their changes are not
            noticed.

    Returns:
        A header per file, or why there is none.
    """
    cached = _load_cache(cache) if cache else {}
    states = {path: _state(path) for path in paths} if cache else {}
    headers: dict[str, Header | Skip] = {
        path: cached[path][1] for path in paths if path in cached and cached[path][0] == states[path]
    }
    fresh = [path for path in paths if path not in headers]
    with ReaderPool(
        _read_header,
        min(num_threads, len(fresh)),
        timeout,
        lambda: gdal_settings(timeout),
        on_timeout=lambda path: Skip(-1, "timed out", path, bad=True),
    ) as pool:
        starts = range(0, len(fresh), FILES_PER_CHUNK)
        for chunk in [pool.submit(fresh[start : start + FILES_PER_CHUNK]) for start in starts]:
            headers.update(zip(chunk.items, pool.results(chunk), strict=True))
    if cache and fresh:
        _save_cache(cache, {path: (states[path], headers[path]) for path in paths})
    return [headers[path] for path in paths]


def _read_header(path: str) -> Header | Skip:
    try:
        raster = Raster(path, georeferenced=False)
        try:
            _check_size(raster)
            _check_sources(raster, set())
            return raster.header
        finally:
            raster.close()
    except Exception as error:  # whatever a file can cause
        return skip_for(path, error, opened=False)


def _check_size(raster: Raster) -> None:
    """Refuse a damaged header that claims more pixels than the file holds: GDAL would read zeros for these."""
    path, header, src = raster.path, raster.header, raster.src
    if is_remote(path) or src.driver != "GTiff" or not header.num_bands:
        return
    size = os.path.getsize(path)
    if header.width * header.height <= MANY_PIXELS_PER_BYTE * size:
        return
    if _lacks_blocks(path, header):
        raise ValueError(f"{header.width} x {header.height} pixels in {size} bytes")
    src.read(1, window=Window(header.width - 1, header.height - 1, 1, 1))  # of the last block


def _check_sources(raster: Raster, opened: set[str]) -> None:
    """Open the files of a virtual raster once: threads that read it together get zeros for those that cannot be opened."""
    opened.add(raster.path)
    if raster.src.driver != "VRT":
        return
    for path in raster.src.files:
        if path not in opened and not path.endswith(SIDECARS):
            source = Raster(path, georeferenced=False)
            try:
                _check_sources(source, opened)
            finally:
                source.close()


def _lacks_blocks(path: str, header: Header) -> bool:
    """Whether a TIFF lists fewer strips or tiles than its size takes; empty ones are listed, too (TIFF 6.0).

    Read from the file, since blocks of GDAL may be parts of strips.
    """
    tags = {}
    with open(path, "rb") as file:
        start = file.read(16)
        order = "<" if start[:2] == b"II" else ">"
        big = start[2:4] in (b"+\0", b"\0+")
        (directory,) = struct.unpack_from(order + ("Q" if big else "I"), start, 8 if big else 4)
        file.seek(directory)
        (entries,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
        for _ in range(min(entries, MAX_TAGS)):
            entry = file.read(20 if big else 12)
            tag, kind = struct.unpack_from(order + "HH", entry)
            (count,) = struct.unpack_from(order + ("Q" if big else "I"), entry, 4)
            (value,) = struct.unpack_from(order + ("H" if kind == SHORT else "I"), entry, 12 if big else 8)
            tags[tag] = count if tag in (STRIP_OFFSETS, TILE_OFFSETS) else value
    if TILE_OFFSETS in tags:
        needed = -(-header.width // tags[TILE_WIDTH]) * -(-header.height // tags[TILE_LENGTH])
    else:
        needed = -(-header.height // min(tags.get(ROWS_PER_STRIP, header.height), header.height))
    return bool(tags.get(TILE_OFFSETS, tags.get(STRIP_OFFSETS, 0)) < needed)


def _state(path: str) -> tuple[int, int] | None:
    """Sizes and modification times of a file and its sidecars, added up; None where headers depend on further files."""
    if not path.lower().endswith(GEOTIFF_ENDINGS):
        return None
    try:
        stats = [os.stat(path)]
    except OSError:
        return None
    for ending in SIDECARS:
        with suppress(OSError):
            stats.append(os.stat(path + ending))
    return sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats)


def _load_cache(path: str) -> dict[str, tuple[object, Header]]:
    """Cached headers; raises TilesError if the cache could not be written again, or is a file of another format."""
    try:
        check_folder("index_cache", os.path.dirname(path) or os.curdir, local=True)
    except ConfigurationError as error:
        raise TilesError(str(error)) from error
    msg = f"index_cache {path} is no index of tiles, expected one or a new file: change index_cache."
    try:
        os.lstat(path)
        content = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise TilesError(msg) from error
    if content.strip() and f'"format": "{CACHE_FORMAT}"' not in content[:CACHE_START]:
        raise TilesError(msg)
    try:
        cache = json.loads(content)
        if cache["version"] != CACHE_VERSION:
            return {}
        return {name: _from_json(*entry) for name, entry in cache["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        warnings.warn(f"The index of tiles {path} is damaged and will be rebuilt.", SimplerWarning, stacklevel=2)
        return {}


def _from_json(
    size: int, changed: int, width: int, height: int, real: bool, descriptions: list[str | None] | None, num_bands: int
) -> tuple[object, Header]:
    header = Header(width, height, real, None if descriptions is None else tuple(descriptions), num_bands)
    integers = all(type(number) is int for number in (size, changed, width, height, num_bands))
    texts = all(text is None or isinstance(text, str) for text in descriptions or ())
    if not (integers and texts and type(real) is bool and all(0 < n < 2**31 for n in (width, height, num_bands))):
        raise ValueError(header)
    return (size, changed), header


def _save_cache(path: str, entries: Mapping[str, tuple[tuple[int, int] | None, Header | Skip]]) -> None:
    files = {
        name: [*state, *header]
        for name, (state, header) in entries.items()
        if state is not None and isinstance(header, Header)
    }
    content = {"format": CACHE_FORMAT, "version": CACHE_VERSION, "files": files}
    with atomic_write(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
