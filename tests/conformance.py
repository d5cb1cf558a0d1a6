"""Streams any folder of rasters through GeoTiffTiles in many settings and compares each window with a read by rasterio.

``python -m tests.conformance FOLDER [--max_files N] [--json OUT]``

The reference uses rasterio and NumPy only, never the package, and opens every file afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple

import numpy as np
import rasterio
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rasterio.enums import MaskFlags
from rasterio.io import DatasetReader, MemoryFile
from rasterio.warp import transform
from rasterio.windows import Window

from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.errors import TilesError

IN_FOLDERS = (".tif", ".tiff", ".gtif", ".gtiff", ".geotiff", ".btf", ".jp2", ".j2k", ".vrt", ".img", ".nc", ".h5", ".hdf5")
"""Endings of the files that are read in a folder; files given by name are read whatever their name."""
FORMATS = frozenset(
    {
        *("GTiff", "VRT", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID", "HFA", "ENVI", "EHdr", "netCDF", "HDF5"),
        *("HDF5Image", "HDF4", "HDF4Image", "GRIB", "SENTINEL2", "NITF", "SRTMHGT", "PNG", "JPEG", "WEBP", "GIF", "BMP"),
    }
)
"""What is read by name; other formats are no raster here."""
LISTS = (".txt", ".csv", ".lst")
"""Endings of files that name other files, and are not read by name here."""
NO_RASTER = frozenset({"unreadable", "no raster", "archive", "permission denied"})
OF_WHOLE_FILES = frozenset({"unreadable", "no date", "no location"})
"""Reasons that may be counted once for a file when they hold for all of its windows."""
FILE_REASONS = frozenset(
    {
        *NO_RASTER,
        *("empty file", "vanished", "timed out", "changed", "complex numbers", "wrong bands", "wrong number of bands"),
        *("smaller than tile_size", "subdatasets", "hidden", "picture", "same file", "no date", "no location"),
        "name is not UTF-8",
    }
)
REASONS = FILE_REASONS | {"nodata", "not finite"}
WHOLE_READ = 2**20
"""Files of at most as many pixels are read as a whole: cheaper than window by window."""
LARGEST_PADDED = 1024
"""Files of longer sides are not padded, to save memory."""
SHOWN = 10

Position = tuple[int, int, int, int]
"""Column, row, width, height."""


# What is expected


class Expected(NamedTuple):
    """A window: what must be delivered, or why not; with both either is right."""

    pixels: np.ndarray | None
    valid: np.ndarray | None
    tolerance: np.ndarray | None
    day: tuple[int, int] | None
    location: tuple[float, float] | None
    reasons: frozenset[str]


@contextlib.contextmanager
def _open(path: str) -> Iterator[DatasetReader]:
    """A file with what lies beside it, whatever the environment sets: TerraTorch's command line leaves that out."""
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="FALSE"), rasterio.open(path) as src:
        yield src


class Reference:
    """What rasterio says of a file.

    Attributes:
        reasons: Why no window of it can be read, whatever the setting; empty if some can.
        error: What rasterio raised, if it cannot open the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.reasons: frozenset[str] = frozenset()
        self.error = ""
        self.width = self.height = self.count = 0
        self._whole: dict[tuple[int, bool], np.ndarray] | None = None
        self._parts: dict[tuple[int, Position, bool], np.ndarray | None] = {}
        try:
            path.encode()
        except UnicodeEncodeError:
            self.reasons = frozenset({"name is not UTF-8"})
            return
        if os.path.getsize(path) == 0:
            self.reasons = frozenset({"empty file"})
            return
        try:
            with _open(path) as src:
                self.driver = src.driver
                self.width, self.height, self.count = src.width, src.height, src.count
                self.dtypes, self.nodatavals, self.flags = src.dtypes, src.nodatavals, src.mask_flag_enums
                self.scales, self.offsets = src.scales, src.offsets
                self.crs, self.transform = src.crs, src.transform
                self.day = _day(src)
                subdatasets = src.subdatasets
                try:
                    self.descriptions = src.descriptions
                except UnicodeDecodeError:
                    self.descriptions = (None,) * src.count
        except Exception as err:  # of any type: whatever rasterio cannot read need not be read
            self.error = f"{type(err).__name__}: {err}"
            self.reasons = NO_RASTER
            return
        if self.driver not in FORMATS:
            self.reasons = NO_RASTER
        elif self.driver == "GTiff" and not _lists_all_blocks(path):
            self.reasons = frozenset({"unreadable"})
        elif not self.count:
            self.reasons = frozenset({"subdatasets"}) if subdatasets else NO_RASTER
        elif any(dtype.startswith("complex") for dtype in self.dtypes):
            self.reasons = frozenset({"complex numbers"})

    def windows(self, setting: Setting) -> list[Position]:
        """The windows that the grid must have."""
        size, step = setting.tile_size, setting.stride

        def starts(side: int) -> Iterable[int]:
            if side < size:
                return [0] if setting.pad else []
            return range(0, side - size + 1, step)

        width, height = min(size, self.width), min(size, self.height)
        return [(column, row, width, height) for row in starts(self.height) for column in starts(self.width)]

    def read(self, at: Position, setting: Setting) -> Expected:
        """What the stream must give for a window."""
        column, row, width, height = at
        reasons = set()
        day = location = None
        if setting.use_metadata:
            day, location = self.day, self._location(column + width / 2, row + height / 2)
            reasons |= ({"no date"} if day is None else set()) | ({"no location"} if location is None else set())
        bands = self._bands(setting)
        stored = [self._read(band, at) for band in bands]
        invalid = [self._invalid(band, at, setting) for band in bands]
        if any(part is None for part in (*stored, *invalid)):
            return Expected(None, None, None, None, None, frozenset(reasons | {"unreadable"}))
        valid = ~np.any(invalid, axis=0)
        with np.errstate(all="ignore"):
            pixels, tolerance = self._scaled(np.stack([band.astype("float32") for band in stored]), bands, setting)
        if not valid.any() or np.mean(~valid) > setting.max_nodata_fraction:
            reasons.add("nodata")
        elif not np.isfinite(pixels[:, valid]).all():
            reasons.add("not finite")
        if reasons:
            return Expected(None, None, None, None, None, frozenset(reasons))
        if location is not None and location[1] > 180:  # to 360 instead of 180: either wrapped or refused
            location = location[0], location[1] - 360
            reasons.add("no location")
        return Expected(pixels, valid, tolerance, day, location, frozenset(reasons))

    def forget(self) -> None:
        """Free the memory of what was read."""
        self._whole = None
        self._parts.clear()

    def value(self, at: Position) -> float | int | None:
        """A stored value in the middle of a window, None if it cannot be read."""
        stored = self._read(1, at)
        return None if stored is None else stored[stored.shape[0] // 2, stored.shape[1] // 2].item()

    def _bands(self, setting: Setting) -> list[int]:
        if setting.bands is None:
            return list(range(1, self.count + 1))
        return [band if isinstance(band, int) else self.descriptions.index(band) + 1 for band in setting.bands]

    def _invalid(self, band: int, at: Position, setting: Setting) -> np.ndarray | None:
        stored = self._read(band, at)
        if stored is None:
            return None
        invalid = np.zeros(stored.shape, bool)
        if stored.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                invalid |= ~np.isfinite(stored) | (np.abs(stored) > np.finfo("float32").max)
        flags = self.flags[band - 1]
        alpha_is_data = MaskFlags.alpha in flags and self.count in self._bands(setting)  # GDAL: the last of 2 or 4 bands
        replaced = setting.nodata is not None and MaskFlags.nodata in flags
        if setting.nodata is not None:
            invalid |= _equal(stored, setting.nodata)
        if MaskFlags.all_valid in flags or alpha_is_data or replaced:
            return invalid
        mask = self._read(band, at, mask=True)
        return None if mask is None else invalid | (mask == 0)

    def _read(self, band: int, at: Position, mask: bool = False) -> np.ndarray | None:
        if self._whole is None:
            self._whole = self._read_whole()
        if (band, mask) in self._whole:
            column, row, width, height = at
            return self._whole[band, mask][row : row + height, column : column + width]
        if (band, at, mask) not in self._parts:
            self._parts.update(self._read_part(at))
        return self._parts[band, at, mask]

    def _read_whole(self) -> dict[tuple[int, bool], np.ndarray]:
        """All bands and masks, as far as they can be read at once."""
        # Only of TIFF: a truncated picture is read as a whole without an error.
        if self.driver != "GTiff" or self.width * self.height > WHOLE_READ:
            return {}
        at = (0, 0, self.width, self.height)
        parts = self._read_part(at)
        return {} if any(part is None for part in parts.values()) else {(b, m): part for (b, _, m), part in parts.items()}

    def _read_part(self, at: Position) -> dict[tuple[int, Position, bool], np.ndarray | None]:
        """All bands and masks of a window."""
        keys = [(band, at, mask) for band in range(1, self.count + 1) for mask in (False, True)]
        keys = [(b, at, mask) for b, _, mask in keys if not (mask and MaskFlags.all_valid in self.flags[b - 1])]
        parts: dict[tuple[int, Position, bool], np.ndarray | None] = {}
        while len(parts) < len(keys):  # opened again after every error: what the same handle then gives is not to be trusted
            try:
                with _open(self.path) as src:
                    for key in keys[len(parts) :]:
                        parts[key] = (src.read_masks if key[2] else src.read)(key[0], window=Window(*at))
            except Exception:  # of any type, as above
                parts[keys[len(parts)]] = None
        return parts

    def contradicts_itself(self, at: Position, setting: Setting) -> bool:
        """Whether rasterio reads a window differently from one time to the next, as it does with some damaged files."""
        for band in self._bands(setting):
            first = self._read(band, at)
            for before in (None, *self.windows(setting)[:8]):
                try:
                    with _open(self.path) as src:
                        if before is not None:
                            src.read(band, window=Window(*before))
                        again = src.read(band, window=Window(*at))
                except Exception:  # of any type, as above
                    again = None
                if (again is None) != (first is None):
                    return True
                if again is not None and not np.array_equal(again, first, equal_nan=again.dtype.kind == "f"):
                    return True
        return False

    def _scaled(self, pixels: np.ndarray, bands: list[int], setting: Setting) -> tuple[np.ndarray, np.ndarray | None]:
        def by_band(values: Iterable[float]) -> np.ndarray:
            return np.array(list(values), "float32").reshape(-1, 1, 1)

        scale, offset, means, stds = setting.scale, setting.offset, setting.means, setting.stds
        if scale == 1 and offset == 0 and means is None:
            return pixels, None
        factor = by_band(self.scales[band - 1] for band in bands) if scale == "file" else np.float32(scale)
        added = by_band(self.offsets[band - 1] for band in bands) if offset == "file" else np.float32(offset)
        found = pixels * factor + added
        terms = np.abs(pixels * factor) + np.abs(added)
        if means is not None:
            found = (found - by_band(means)) / by_band(stds)
            terms = (terms + np.abs(by_band(means))) / by_band(stds)
        return found, 1e-5 * terms

    def _location(self, x: float, y: float) -> tuple[float, float] | None:
        """Latitude and longitude, the latter up to 360; None where there is none."""
        if self.crs is None or self.transform.is_identity:
            return None
        try:
            (longitude,), (latitude,) = transform(self.crs, "EPSG:4326", *([value] for value in self.transform * (x, y)))
        except Exception:  # of any type, as above
            return None
        return (latitude, longitude) if abs(latitude) <= 90 and -180 <= longitude <= 360 else None


def _lists_all_blocks(path: str) -> bool:
    """Whether the directory of a TIFF has a place for every block: of others GDAL makes zeros, without an error."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            directory = ImageFileDirectory_v2(start if 43 in start[2:4] else start[:8])
            file.seek(directory.next)
            directory.load(file)
        width, height = directory[256], directory[257]
        if 324 in directory:
            return len(directory[324]) >= math.ceil(width / directory[322]) * math.ceil(height / directory[323])
        return len(directory[273]) >= math.ceil(height / directory.get(278, height))
    except Exception:  # of any type: of what Pillow cannot read nothing is known
        return True


def _equal(stored: np.ndarray, nodata: float) -> np.ndarray:
    """Where pixels are a nodata value: integers exactly, floats as GDAL itself finds."""
    if stored.dtype.kind != "f":
        finite = math.isfinite(nodata) and nodata == math.floor(nodata)
        limits = np.iinfo(stored.dtype)
        if not finite or not limits.min <= nodata <= limits.max:
            return np.zeros(stored.shape, bool)
        return stored == stored.dtype.type(int(nodata))
    if math.isnan(nodata):
        return np.isnan(stored)
    with np.errstate(all="ignore"):
        # Far wider than GDAL's tolerance, unless it overflows.
        near = np.abs(stored.astype("f8") - nodata) <= 1e-3 * abs(nodata)
    if abs(nodata) < 1e37 and not near.any():
        return near
    shape = {"width": stored.shape[1], "height": stored.shape[0], "count": 1, "dtype": stored.dtype}
    with MemoryFile() as memory:
        try:
            with memory.open(driver="GTiff", nodata=nodata, **shape) as target:
                target.write(stored, 1)
        except ValueError:  # rasterio: beyond the range of the type
            return np.zeros(stored.shape, bool)
        with memory.open() as source:
            return source.read_masks(1) == 0


def _day(src: Any) -> tuple[int, int] | None:
    for namespace, name in (
        ("IMAGERY", "ACQUISITIONDATETIME"),
        (None, "SENSING_TIME"),
        (None, "DATE_ACQUIRED"),
        (None, "TIFFTAG_DATETIME"),
    ):
        found = re.match(r"\s*(\d{4})[-:/]?(\d\d)[-:/]?(\d\d)", src.tags(ns=namespace).get(name, ""))
        with contextlib.suppress(ValueError):
            if found:
                day = date(*map(int, found.groups()))
                return day.year, day.timetuple().tm_yday - 1
    return None


# What is asked for


@dataclass(frozen=True)
class Setting:
    """Arguments of the stream. Those of the reference are attributes; ``more`` are without effect on what is delivered."""

    name: str
    tile_size: int
    stride: int
    bands: list[int | str] | None = None
    nodata: float | None = None
    max_nodata_fraction: float = 0.5
    scale: float | str = 1.0
    offset: float | str = 0.0
    means: list[float] | None = None
    stds: list[float] | None = None
    pad: str | None = None
    use_metadata: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """As the stream takes them."""
        own = {name: value for name, value in vars(self).items() if name not in ("name", "more")}
        return {"batch_size": 8, "num_workers": 0, "max_bad_fraction": 1.0, **own, **self.more}


def settings(reference: Reference, max_windows: int, workers: int) -> Iterator[Setting]:
    """The settings in which a file is streamed.

    Args:
        reference: The file.
        max_windows: Windows in one setting.
        workers: Threads in one of the settings; the others read in the caller's thread.
    """
    width, height, count = reference.width, reference.height, reference.count
    size = 64 if min(width, height) >= 192 or not count else 32  # several windows in small files

    def stride(start: int) -> int:
        while ((width - size) // start + 1) * ((height - size) // start + 1) > max_windows:
            start += start // 2
        return start

    step = stride(size)
    yield Setting("plain", size, step, more={"num_frames": 1})
    if reference.reasons:
        return
    yield Setting("overlap", size, stride(3 * size // 4), max_nodata_fraction=1.0, more={"num_workers": workers})
    yield Setting("first band", size, step, [1], max_nodata_fraction=0.0)
    bands = [count, 1] if count > 1 else None
    means, stds = [10.0, 0.5][: min(count, 2)], [3.0, 250.0][: min(count, 2)]
    yield Setting("statistics", size, step, bands, None, 1.0, 0.5, -1.0, means, stds)
    yield Setting("metadata", size, step, use_metadata=True)
    if {*reference.scales, *reference.offsets} - {0.0, 1.0}:
        yield Setting("file's scale", size, step, scale="file", offset="file", max_nodata_fraction=1.0)
    last = reference.descriptions[-1]
    if last and reference.descriptions.count(last) == 1:
        yield Setting("description", size, step, [last])
    windows = reference.windows(Setting("", size, step))
    value = reference.value(windows[len(windows) // 2]) if windows else None
    if value is not None and not (isinstance(value, float) and math.isinf(value)):  # infinities are no argument
        yield Setting("nodata occurs", size, step, nodata=value, max_nodata_fraction=1.0)
    if any(nodata is not None for nodata in reference.nodatavals):
        yield Setting("nodata nan", size, step, nodata=float("nan"), max_nodata_fraction=1.0)
    longest = max(width, height)
    if longest <= LARGEST_PADDED and count * longest**2 <= 2**24:
        yield Setting("padded", longest + 9, longest + 9, pad="reflect", max_nodata_fraction=1.0)
        if width != height:
            middle = min(width, height) + (longest - min(width, height) + 1) // 2
            yield Setting("one side padded", middle, middle, pad="reflect", max_nodata_fraction=1.0)


# Comparing


@dataclass
class Report:
    """Counts, and what differs."""

    files: int = 0
    streams: int = 0
    windows: int = 0
    exact: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    doubtful: int = 0
    refused: int = 0
    wrong: int = 0
    crashed: int = 0
    uncounted: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the stream breaks its contract."""
        return bool(self.wrong or self.crashed or self.uncounted)

    def differs(self, kind: str, path: str, setting: str, window: object, what: str, amount: int = 1) -> None:
        """Count and keep a difference; kind is the counter's name."""
        setattr(self, kind, getattr(self, kind) + amount)
        self.differences.append({"kind": kind, "path": path, "setting": setting, "window": window, "what": what})

    def __str__(self) -> str:
        rows: list[tuple[str, int]] = [("files", self.files), ("streams", self.streams), ("windows compared", self.windows)]
        rows += [("exact", self.exact)]
        rows += [(f"skipped: {reason}", amount) for reason, amount in sorted(self.skipped.items())]
        rows += [("rasterio contradicts itself", self.doubtful)]
        rows += [("refused with TilesError", self.refused), ("wrong", self.wrong), ("crashed", self.crashed)]
        rows += [("uncounted", self.uncounted)]
        wide = max(len(name) for name, _ in rows)
        lines = [f"{name:<{wide}}  {amount:>9,}" for name, amount in rows] + self.notes
        first = {found["path"]: found for found in reversed(self.differences)}  # one a file
        for found in [*reversed(first.values())][:SHOWN]:
            lines.append(
                f"{found['kind']}: {found['path']!a} [{found['setting']}] window {found['window']}: {found['what']}"
            )
        if len(self.differences) > SHOWN:
            lines.append(
                f"{len(self.differences)} differences in {len(first)} files; the first of each of {SHOWN} are shown"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "skipped": dict(self.skipped), "failed": self.failed}


class Streamed(NamedTuple):
    """What came out of one stream."""

    tiles: list[dict[str, Any]]
    skipped: dict[str, int]
    window_skips: list[Any]
    file_skips: list[Any]
    error: BaseException | None


def stream(
    make: Callable[..., Any], path: str, arguments: dict[str, Any], on_tile: Callable[[dict[str, Any]], Any]
) -> Streamed:
    """Stream everything.

    Args:
        make: Makes the tiles, from path and arguments.
        path: File or folder.
        arguments: Its other arguments.
        on_tile: Told every tile; what it returns is kept.
    """
    kept: list[Any] = []
    skips: list[Any] = []
    tiles, error = None, None
    try:
        tiles = make(path, **arguments)
        tiles.on_skip = skips.append
        for batch in tiles:
            for number in range(len(batch["index"])):
                kept.append(on_tile({key: values[number] for key, values in batch.items()}))
    except Exception as err:
        error = err
    skipped = dict(tiles.skipped) if tiles is not None else {}
    by_window = [skip for skip in skips if skip.position >= 0]
    return Streamed(kept, skipped, by_window, [skip for skip in skips if skip.position < 0], error)


def check_tile(tile: dict[str, Any], reference: Reference, setting: Setting, expected: Expected) -> str:
    """What is wrong with a delivered tile; empty if nothing."""
    image, valid = tile["image"].numpy(), tile["valid"].numpy()
    _, _, width, height = tile["window"].tolist()
    bands, size = len(reference._bands(setting)), setting.tile_size
    if image.dtype != np.float32 or image.shape != (bands, size, size):
        return f"image {image.dtype} {image.shape}, expected float32 {(bands, size, size)}"
    if valid.dtype != bool or valid.shape != (size, size):
        return f"valid {valid.dtype} {valid.shape}, expected bool {(size, size)}"
    if expected.pixels is None or expected.valid is None:
        return f"delivered, expected to be skipped as {_or(expected.reasons)}"
    if not np.isfinite(image).all():
        band, row, column = np.argwhere(~np.isfinite(image))[0].tolist()
        return f"image {image[band, row, column]} at band {band}, row {row}, column {column}, expected finite values"
    known = np.zeros((size, size), bool)
    known[:height, :width] = expected.valid
    if not np.array_equal(valid, known):
        row, column = np.argwhere(valid != known)[0].tolist()
        other = int(np.count_nonzero(valid != known))
        return (
            f"valid {valid[row, column]} at row {row}, column {column}, expected {known[row, column]} ({other} such pixels)"
        )
    corner = image[:, :height, :width]
    tolerance = 0 if expected.tolerance is None else expected.tolerance
    with np.errstate(all="ignore"):
        wrong = (np.abs(corner.astype("f8") - expected.pixels) > tolerance) & expected.valid
    if wrong.any():
        band, row, column = np.argwhere(wrong)[0].tolist()
        got, wanted = corner[band, row, column], expected.pixels[band, row, column]
        return f"image {got!r} at band {band}, row {row}, column {column}, expected {wanted!r} ({wrong.sum()} such values)"
    if not np.array_equal(image, np.pad(corner, ((0, 0), (0, size - height), (0, size - width)), mode="reflect")):
        return "added pixels differ from np.pad(mode='reflect')"
    if setting.use_metadata:
        return _check_metadata(tile, expected)
    return ""


def _check_metadata(tile: dict[str, Any], expected: Expected) -> str:
    days, location = tile["temporal_coords"].tolist(), tile["location_coords"].tolist()
    if days != [list(map(float, expected.day or ()))]:
        return f"temporal_coords {days}, expected {expected.day}"
    latitude, longitude = location
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        return f"location_coords {location}, expected at most 90 and 180 degrees"
    if not np.allclose(location, expected.location or (), rtol=0, atol=1e-4):
        return f"location_coords {location}, expected {expected.location}"
    return ""


def check_file(report: Report, reference: Reference, setting: Setting, make: Callable[..., Any]) -> None:
    """Stream one file in one setting, and compare."""
    path, name = reference.path, setting.name
    report.streams += 1
    grid = [] if reference.reasons else reference.windows(setting)
    expected = {at: reference.read(at, setting) for at in grid}
    seen: Counter[Position] = Counter()

    def compare(tile: dict[str, Any]) -> None:
        at = tuple(tile["window"].tolist())
        seen[at] += 1
        report.windows += 1
        if os.path.abspath(tile["path"]) != path:
            report.differs("wrong", path, name, at, f"path {tile['path']!a}, expected that of the file")
        elif at not in expected:
            report.differs("wrong", path, name, at, "no window of the grid")
        elif seen[at] > 1:
            report.differs("wrong", path, name, at, f"delivered {seen[at]} times, expected once")
        elif wrong := check_tile(tile, reference, setting, expected[at]):
            if reference.contradicts_itself(at, setting):
                report.doubtful += 1
                expected[at] = expected[at]._replace(reasons=frozenset())
            else:
                report.differs("wrong", path, name, at, wrong)
        else:
            report.exact += 1

    found = stream(make, path, setting.arguments(), compare)
    report.skipped.update(found.skipped)
    must = [at for at in grid if not expected[at].reasons]
    if found.error is not None:
        if isinstance(found.error, TilesError) and not must:
            report.refused += 1
        else:
            what = f"{type(found.error).__name__}: {found.error}"
            report.differs("crashed", path, name, None, f"raised {what[:300]}, expected {len(must)} of {len(grid)} windows")
            return
        if not found.skipped:  # refused before anything was counted
            return
    _check_counts(report, reference, setting, found, expected, seen)


def _check_counts(
    report: Report,
    reference: Reference,
    setting: Setting,
    found: Streamed,
    expected: dict[Position, Expected],
    seen: Counter[Position],
) -> None:
    path, name, counted = reference.path, setting.name, found.skipped
    if unknown := set(counted) - REASONS:
        report.differs("wrong", path, name, None, f"counted as {_or(unknown)}, expected one of the known reasons")
    missing = [at for at in expected if not seen[at]]
    if not expected:
        reasons = reference.reasons or {"smaller than tile_size"}
        if sum(counted.values()) != 1 or not set(counted) <= reasons:
            kind = "wrong" if counted else "uncounted"
            report.differs(kind, path, name, None, f"counted {counted}, expected the file as {_or(reasons)}")
        return
    for reason in OF_WHOLE_FILES & set(counted):
        if counted == {reason: 1} and not seen and all(reason in part.reasons for part in expected.values()):
            return
    total = sum(counted.values())
    if total < len(missing):
        amount = len(missing) - total
        lost = next((at for at in missing if not expected[at].reasons), missing[0])
        what = f"neither delivered nor counted ({amount} of {len(expected)} windows), skipped: {counted}"
        report.differs("uncounted", path, name, lost, what, amount)
        return
    if total > len(missing):
        report.differs("wrong", path, name, None, f"{total} skipped ({counted}), expected {len(missing)}")
        return
    doubtful = [at for at in missing if not expected[at].reasons and reference.contradicts_itself(at, setting)]
    report.doubtful += len(doubtful)
    if wrongly := [at for at in missing if not expected[at].reasons and at not in doubtful]:
        what = f"skipped as {_or(counted)}, expected to be delivered ({len(wrongly)} such windows)"
        report.differs("wrong", path, name, wrongly[0], what, len(wrongly))
        return
    if doubtful:
        return
    for reason in set(counted) | {reason for at in missing for reason in expected[at].reasons}:
        least = sum(expected[at].reasons == {reason} for at in missing)
        most = sum(reason in expected[at].reasons for at in missing)
        if not least <= counted.get(reason, 0) <= most:
            what = f"counted {counted}, expected {least} to {most} windows as {reason}"
            report.differs("wrong", path, name, None, what)
            return


def check_folder(
    report: Report, folder: str, files: list[str], others: int, references: dict[str, Reference], make: Callable[..., Any]
) -> None:
    """Stream the folder: every regular file gives tiles or is counted.

    Args:
        report: Counts and differences are added.
        folder: Which folder.
        files: All regular files below it.
        others: Links, pipes and whatever else may be counted besides.
        references: The reference of every file.
        make: Makes the tiles.
    """
    report.streams += 1
    size = 32
    sides = [max(reference.width, reference.height) for reference in references.values() if not reference.reasons]
    step = max(size, max(sides, default=0) // 8)
    setting = Setting("folder", size, step, max_nodata_fraction=1.0, more={"num_workers": 2})
    seen: Counter[tuple[str, Position]] = Counter()
    bands = set()

    def compare(tile: dict[str, Any]) -> str:
        at, path = tuple(tile["window"].tolist()), os.path.abspath(tile["path"])
        seen[path, at] += 1
        report.windows += 1
        bands.add(len(tile["image"]))
        reference = references.get(path)
        if reference is None:
            report.differs("wrong", path, "folder", at, "no regular file below the folder")
        elif not read_in_folders(path) or reference.reasons or at not in reference.windows(setting):
            report.differs("wrong", path, "folder", at, "delivered, expected the file to be counted only")
        elif seen[path, at] > 1:
            report.differs("wrong", path, "folder", at, f"delivered {seen[path, at]} times, expected once")
        elif wrong := check_tile(tile, reference, setting, reference.read(at, setting)):
            if reference.contradicts_itself(at, setting):
                report.doubtful += 1
            else:
                report.differs("wrong", path, "folder", at, wrong)
        else:
            report.exact += 1
        return path

    found = stream(make, folder, setting.arguments(), compare)
    report.skipped.update(found.skipped)
    read = {path: r for path, r in references.items() if read_in_folders(path) and not r.reasons}
    if found.error is not None:
        what = f"raised {type(found.error).__name__}: {str(found.error)[:300]}"
        nothing = not any(not r.read(at, setting).reasons for r in read.values() for at in r.windows(setting)[:1])
        if isinstance(found.error, TilesError) and nothing:
            report.refused += 1
        else:
            report.differs("crashed", folder, "folder", None, what)
        return
    if unknown := set(found.skipped) - REASONS:
        report.differs("wrong", folder, "folder", None, f"counted as {_or(unknown)}, expected one of the known reasons")
    used = {*found.tiles, *(os.path.abspath(skip.name) for skip in found.window_skips)}
    named = {os.path.abspath(skip.name) for skip in found.file_skips}
    counted = sum(found.skipped.values()) - len(found.window_skips)
    # Whether these count one by one is left open.
    in_hidden_folders = [
        path for path in files if any(part.startswith(".") for part in os.path.relpath(path, folder).split(os.sep)[:-1])
    ]
    lost = len(files) - len(in_hidden_folders) - len(used) - counted
    if lost > 0:
        first = [os.path.relpath(path, folder) for path in files if path not in used | named][:SHOWN]
        what = f"{lost} of {len(files)} files give no tile and are not counted, such as {first!a}"
        report.differs("uncounted", folder, "folder", None, what, lost)
    elif -lost > others + len(in_hidden_folders):
        what = f"{len(used) + counted} files used or counted, expected {len(files)} and at most {others} others"
        report.differs("wrong", folder, "folder", None, what)
    for path, reference in read.items():
        grid = reference.windows(setting)
        if reference.count not in bands or path in in_hidden_folders:
            continue
        must = [at for at in grid if not seen[path, at] and not reference.read(at, setting).reasons]
        if must and path not in used:
            report.differs("wrong", path, "folder", None, "gives no tile in the folder, expected some")
        elif must:
            report.differs("uncounted", path, "folder", must[0], "not delivered", len(must))


def read_in_folders(path: str) -> bool:
    """Whether a file is read where its folder is given."""
    name = os.path.basename(path)
    return name.lower().endswith(IN_FOLDERS) and not name.startswith(".")


def find(folder: str) -> tuple[list[str], int]:
    """All regular files below a folder in order, and how many other things there are."""
    files, others = [], 0

    def unreadable(_: OSError) -> None:
        nonlocal others
        others += 1

    for here, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        others += sum(os.path.islink(os.path.join(here, name)) for name in folders)
        for name in sorted(names):
            path = os.path.join(here, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                files.append(path)
            else:
                others += 1
    return files, others


def conform(
    folder: str | os.PathLike[str],
    max_files: int | None = None,
    max_windows: int = 64,
    workers: int = 2,
    select: Callable[[Reference, Setting], bool] = lambda *_: True,
    make: Callable[..., Any] = GeoTiffTiles,
) -> Report:
    """Compare the stream of every file below a folder, and of the folder, with rasterio.

    Args:
        folder: Which folder.
        max_files: At most as many files, evenly spread; the folder itself is then streamed only if these are all.
        max_windows: Windows of a file in one setting.
        workers: Threads, where any are used.
        select: Which settings are used for a file.
        make: Makes the tiles from a path and arguments.
    """
    folder = os.path.abspath(folder)
    report = Report()
    files, others = find(folder)
    chosen = files
    if max_files is not None and len(files) > max_files:
        chosen = [files[number * len(files) // max_files] for number in range(max_files)]
    logger = logging.getLogger("rasterio")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    references: dict[str, Reference] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for path in chosen:
                report.files += 1
                reference = references[path] = Reference(path)
                if path.lower().endswith(LISTS):
                    continue
                for setting in settings(reference, max_windows, workers):
                    if select(reference, setting):
                        check_file(report, reference, setting, make)
                _check_relative(report, path, reference, make)
                reference.forget()
            if len(chosen) == len(files):
                check_folder(report, folder, files, others, references, make)
            else:
                report.notes.append(f"{len(files) - len(chosen)} files and the folder as a whole left out (max_files)")
    finally:
        logger.setLevel(level)
    return report


def _check_relative(report: Report, path: str, reference: Reference, make: Callable[..., Any]) -> None:
    """Names such as zip:a.tif, which GDAL and rasterio take for more than a name, from within their folder."""
    name = os.path.basename(path)
    if ":" not in name or reference.reasons:
        return
    setting = next(settings(reference, max_windows=4, workers=0))
    with contextlib.chdir(os.path.dirname(path)):
        check_file(report, reference, setting, lambda _, **arguments: make(name, **arguments))


def _or(reasons: Iterable[str]) -> str:
    return " or ".join(sorted(reasons)) or "nothing"


def main(argv: list[str] | None = None) -> int:
    """Command line.

    Returns:
        1 if anything is wrong, crashed or uncounted.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--max_files", type=int)
    parser.add_argument("--max_windows", type=int, default=64, help="of a file in one setting")
    parser.add_argument("--json", help="where to write all counts and differences")
    arguments = parser.parse_args(argv)
    if not os.path.isdir(arguments.folder):
        parser.error(f"{arguments.folder} is not a folder")
    report = conform(arguments.folder, arguments.max_files, arguments.max_windows)
    print(report)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report.as_json(), file, indent=1)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
