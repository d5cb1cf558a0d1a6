"""What is in the files, without reading a pixel: sizes, bands, dates, and from these the grid of all windows."""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from rasterio.windows import Window
from torchgeo.datasets.utils import disambiguate_timestamp

from terratorch_simpler.data.failures import unusable
from terratorch_simpler.data.paths import GEOTIFF_ENDINGS, is_remote
from terratorch_simpler.data.prefetch import Readers, TimedOut
from terratorch_simpler.data.rasters import Header, Raster, gdal_settings
from terratorch_simpler.data.source import Unusable
from terratorch_simpler.errors import ConfigurationError, SimplerWarning, TilesError
from terratorch_simpler.files import atomic_write, check_folder

MANY_PIXELS_PER_BYTE = 2**10
"""No block of pixels that differ at all is packed so well: the file is nearly empty, or its header is damaged."""
MAX_TAGS = 4096
STRIP_OFFSETS, ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS = 273, 278, 322, 323, 324
SHORT = 3
"""Tags and a type of TIFF."""

CACHE_FORMAT = "terratorch-simpler/tile-index"
CACHE_VERSION = 1
CACHE_START = 100
"""Characters in which a file says that it is an index of tiles: no other is written over."""

FILES_PER_RUN = 32

SIDECARS = (".aux.xml", ".msk", ".ovr")
"""Endings of the files in which GDAL keeps more of a raster beside it."""

MAX_WINDOWS = 2**28
"""Windows of one file: more is the size of a damaged header, or a stride that nobody means. Their order takes 4 GB."""

TOO_SMALL = "smaller than tile_size"
SUBDATASETS = "subdatasets"
"""A container of several images, of which none is named."""


class TileWindow(NamedTuple):
    """A window: its number in the grid of all windows, its files (one a time step), and its pixels."""

    number: int
    paths: tuple[str, ...]
    column: int
    row: int
    width: int
    height: int


class Grid:
    """All windows on the grids of all series of files, numbered one series after the other, row by row.

    A sequence that holds one entry a series, not one a window: a thousand scenes have millions of windows.

    Args:
        series: Files of one place, one a time step.
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
        # A side shorter than a tile has one window: whether it is padded or left out is decided before.
        self._columns = [max(0, width - tile_size) // stride + 1 for width, _ in sizes]
        rows = [max(0, height - tile_size) // stride + 1 for _, height in sizes]
        self._ends = list(accumulate(c * r for c, r in zip(self._columns, rows, strict=True)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> TileWindow:
        """The window of a number.

        Raises:
            IndexError: If there is none.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        at = bisect_right(self._ends, number)
        row, column = divmod(number - (self._ends[at - 1] if at else 0), self._columns[at])
        (width, height), side, stride = self._sizes[at], self._tile_size, self._stride
        return TileWindow(number, self._series[at], column * stride, row * stride, min(side, width), min(side, height))


class TileIndex:
    """The headers of all files: what each can contribute, and why some cannot.

    Args:
        paths: Files.
        headers: Their headers, or why there is none.

    Attributes:
        unusable: What cannot be used, and why.
        headers: The headers of the files that can be used.
        bands: Bands to read of each, from 1.
    """

    def __init__(self, paths: Sequence[str], headers: Sequence[Header | Unusable]) -> None:
        self.unusable = [header for header in headers if isinstance(header, Unusable)]
        self.headers = {path: header for path, header in zip(paths, headers, strict=True) if isinstance(header, Header)}
        self.bands: dict[str, list[int]] = {}

    def choose_bands(self, bands: Sequence[int | str] | None) -> None:
        """Find the bands in every file; files without them are set aside.

        Args:
            bands: Numbers from 1 or descriptions; None for all, as many as most files have.

        Raises:
            TilesError: If no file has the bands.
        """
        counts = Counter(header.num_bands for header in self.headers.values() if header.real and header.num_bands)
        most = max(
            counts, key=lambda count: (counts[count], count), default=0
        )  # masks have fewer than the images beside them
        first_refusal = None
        for path, header in self.headers.items():
            if not header.num_bands:
                self._refuse(path, SUBDATASETS, bad=False)
            elif not header.real:
                self._refuse(path, "complex numbers")
            elif bands is not None and header.descriptions is None and any(isinstance(band, str) for band in bands):
                self._refuse(path, "unreadable")
            elif bands is None:
                self.bands[path] = list(range(1, header.num_bands + 1))
                if header.num_bands != most:
                    self._refuse(path, "wrong number of bands")
            else:
                known = header.descriptions or ()
                found = [known.index(b) + 1 if b in known else 0 if isinstance(b, str) else b for b in bands]
                self.bands[path] = found
                wrong = [band for band, index in zip(bands, found, strict=True) if not 1 <= index <= header.num_bands]
                if wrong:
                    named = [description for description in known if description]
                    first_refusal = first_refusal or (
                        f"Found no band {wrong[0]!r} in {path}, expected 1 to {header.num_bands} or one of {named}: "
                        "change bands."
                    )
                    self._refuse(path, "wrong bands")
        self._drop_refused()
        if first_refusal and not self.headers:
            raise TilesError(first_refusal)

    def series(
        self, num_frames: int, filename_regex: str | None, date_format: str
    ) -> tuple[list[tuple[str, ...]], dict[str, tuple[int, int]]]:
        """Group files of one place into runs of ``num_frames`` dates, and tell the date of each.

        Args:
            num_frames: Files in a run.
            filename_regex: Pattern with a group ``date``, and perhaps ``tile``; None if every file is a series by itself.
            date_format: How the date is written.

        Returns:
            Series, each in order of the dates, and (year, day of the year from 0) of every file with a date.
        """
        if filename_regex is None:
            return [(path,) for path in self.headers], {}
        pattern = re.compile(filename_regex, re.VERBOSE)
        dated: dict[object, list[tuple[object, str]]] = {}
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
                self._refuse(path, "name without a date", bad=False)
                continue
            days[path] = (moment.year, moment.timetuple().tm_yday - 1)
            start, end = match.span("date")
            tile = match.groupdict().get("tile") or (folder.replace(date, ""), name[:start] + name[end:])
            dated.setdefault(tile, []).append((moment, path))
        self._drop_refused()
        series = []
        for frames in dated.values():
            ordered = [path for _, path in sorted(frames)]
            for start in range(0, len(ordered), num_frames):
                run = ordered[start : start + num_frames]
                if len(run) < num_frames:
                    self._set_aside(run, "too few dates", bad=False)
                elif len({self._size(path) for path in run}) > 1:
                    self._set_aside(run, "dates of unequal size", bad=True)
                else:
                    series.append(tuple(run))
        return series, days

    def grid(self, series: Sequence[tuple[str, ...]], tile_size: int, stride: int, pad: bool) -> Grid:
        """The windows of the series; those smaller than a tile are set aside unless they are padded."""
        usable = []
        for run in series:
            width, height = self._size(run[0])
            if not pad and min(width, height) < tile_size:
                self._set_aside(run, TOO_SMALL, bad=False)
            elif len(Grid([run], [(width, height)], tile_size, stride)) > MAX_WINDOWS:
                self._set_aside(run, "too many windows", bad=True)
            else:
                usable.append(run)
        return Grid(usable, [self._size(run[0]) for run in usable], tile_size, stride)

    def _size(self, path: str) -> tuple[int, int]:
        header = self.headers[path]
        return header.width, header.height

    def _set_aside(self, run: Iterable[str], reason: str, bad: bool) -> None:
        self.unusable.extend(Unusable(path, reason, bad) for path in run)

    def _refuse(self, path: str, reason: str, bad: bool = True) -> None:
        self._set_aside([path], reason, bad)
        self.bands.pop(path, None)

    def _drop_refused(self) -> None:
        refused = {unusable.path for unusable in self.unusable}
        self.headers = {path: header for path, header in self.headers.items() if path not in refused}


def read_headers(paths: Sequence[str], num_threads: int, timeout: float, cache: str | None) -> list[Header | Unusable]:
    """Open every file once, in parallel, unless the cache knows it unchanged.

    Args:
        paths: Files.
        num_threads: Threads that open.
        timeout: Seconds one file may take.
        cache: JSON file to read headers from and keep them in; files that GDAL has to find are not kept, since nothing
            tells whether they changed.

    Returns:
        One header, or the reason why there is none, a file.
    """
    known = _load_cache(cache) if cache else {}
    states = {path: _state(path) for path in paths} if cache else {}
    found: dict[str, Header | Unusable] = {
        path: known[path][1] for path in paths if path in known and known[path][0] == states[path]
    }
    fresh = [path for path in paths if path not in found]
    for path, header in zip(fresh, _open_all(fresh, num_threads, timeout), strict=True):
        found[path] = Unusable(path, "timed out", True) if isinstance(header, TimedOut) else header
    if cache and fresh:
        _save_cache(cache, {path: (states[path], found[path]) for path in paths})
    return [found[path] for path in paths]


def _open_all(paths: Sequence[str], num_threads: int, timeout: float) -> Iterator[Header | Unusable | TimedOut]:
    context = (lambda: gdal_settings(timeout)) if paths else nullcontext
    with Readers(_read_header, min(num_threads, len(paths)), timeout, context) as readers:
        runs = [readers.submit(paths[start : start + FILES_PER_RUN]) for start in range(0, len(paths), FILES_PER_RUN)]
        for run in runs:
            yield from readers.results(run)


def _read_header(path: str) -> Header | Unusable:
    try:
        raster = Raster(path, located=False)
        try:
            _check_size(raster)
            _check_sources(raster, set())
            return raster.header
        finally:
            raster.close()
    except Exception as error:  # whatever a file can cause
        return unusable(path, error, opened=False)


def _check_size(raster: Raster) -> None:
    """Refuse a damaged header that claims more pixels than the file has, of which GDAL would make zeros.

    Raises:
        ValueError: If the file cannot hold what it says.
    """
    path, header, src = raster.path, raster.header, raster.src
    if is_remote(path) or src.driver != "GTiff" or not header.num_bands:
        return
    size = os.path.getsize(path)
    if header.width * header.height <= MANY_PIXELS_PER_BYTE * size:
        return
    if _lacks_blocks(path, header):
        raise ValueError(f"{header.width} x {header.height} pixels in {size} bytes")
    src.read(1, window=Window(header.width - 1, header.height - 1, 1, 1))  # of the last block


def _check_sources(raster: Raster, seen: set[str]) -> None:
    """Open what a virtual raster names, once: threads that read it together get zeros for what cannot be opened.

    Raises:
        Exception: Of any type, if one cannot be opened.
    """
    seen.add(raster.path)
    if raster.src.driver != "VRT":
        return
    for path in raster.src.files:
        if path not in seen and not path.endswith(SIDECARS):
            source = Raster(path, located=False)
            try:
                _check_sources(source, seen)
            finally:
                source.close()


def _lacks_blocks(path: str, header: Header) -> bool:
    """Whether the directory of a TIFF lists fewer strips or tiles than its size takes; empty ones are listed (TIFF 6.0).

    GDAL does not tell: what it calls blocks may be parts of strips.
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
    """Size and time of the last change of a file and what lies beside it, which tell whether a header is still true.

    Of formats whose headers depend on other files nothing is known.
    """
    if not path.lower().endswith(GEOTIFF_ENDINGS):
        return None
    try:
        found = [os.stat(path)]
    except OSError:
        return None
    for ending in SIDECARS:
        with suppress(OSError):
            found.append(os.stat(path + ending))
    return sum(stat.st_size for stat in found), sum(stat.st_mtime_ns for stat in found)


def _load_cache(path: str) -> dict[str, tuple[object, Header]]:
    """Read what was kept.

    Raises:
        TilesError: If it could not be written again, or is somebody else's file.
    """
    try:
        check_folder("index_cache", os.path.dirname(path) or os.curdir, local=True)
    except ConfigurationError as error:
        raise TilesError(str(error)) from error
    msg = f"Found index_cache {path}, which holds no index of tiles, expected one or a new file: change index_cache."
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
        found = json.loads(content)
        if found["version"] != CACHE_VERSION:
            return {}
        return {name: _from_json(*entry) for name, entry in found["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        warnings.warn(f"Found {path} damaged, expected an index of tiles: it is made anew.", SimplerWarning, stacklevel=2)
        return {}


def _from_json(
    size: int, changed: int, width: int, height: int, real: bool, descriptions: list[str | None] | None, num_bands: int
) -> tuple[object, Header]:
    numbers = (width, height, num_bands)
    if not all(type(number) is int and 0 < number < 2**31 for number in numbers) or type(real) is not bool:
        raise ValueError(numbers)
    if type(size) is not int or type(changed) is not int:
        raise TypeError(size, changed)
    if descriptions is not None and not all(text is None or isinstance(text, str) for text in descriptions):
        raise ValueError(descriptions)
    return (size, changed), Header(width, height, real, None if descriptions is None else tuple(descriptions), num_bands)


def _save_cache(path: str, entries: Mapping[str, tuple[object, Header | Unusable]]) -> None:
    kept = {
        name: [*state, *header]  # type: ignore[misc]
        for name, (state, header) in entries.items()
        if state is not None and isinstance(header, Header)
    }
    content = {"format": CACHE_FORMAT, "version": CACHE_VERSION, "files": kept}
    with atomic_write(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
