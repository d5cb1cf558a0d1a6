"""Open raster files: GDAL settings, how many stay open, pixels as float32, and which of them hold data."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.env import ensure_env_with_credentials
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from terratorch_simpler.data.paths import GEOTIFF_ENDINGS, is_remote

PICTURES = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID"]
DRIVERS = [
    *("GTiff", *PICTURES, "HFA", "ENVI", "EHdr", "netCDF", "HDF5", "HDF5Image", "HDF4", "HDF4Image", "GRIB"),
    *("SENTINEL2", "NITF", "SRTMHGT"),
]
"""Formats that hold pixels, not those whose files name other rasters or servers: only a .vrt is read as one. HDF5 and HFA
may still name another local file with pixels."""

TOLERANCE = 2 * float(np.finfo(np.float32).eps)
"""GDAL takes a float of either size for nodata if the two differ by less than this fraction of their sum."""

ROUNDED = ("int64", "uint64")
"""Types whose nodata rasterio returns as a float."""

MAX_OPEN = 32
"""Files that stay open while nobody reads from them."""


def gdal_settings(timeout: float) -> AbstractContextManager[object]:
    """GDAL settings for the reads of one thread; settings in the user's environment win, with one exception.

    ``terratorch fit`` sets ``GDAL_DISABLE_READDIR_ON_OPEN=EMPTY_DIR``, under which GDAL ignores the sidecar files of local
    rasters: masks, headers, georeference.
    """
    defaults = {
        "VRT_SHARED_SOURCE": 0,  # else threads that read two virtual rasters share the files these name
        "GDAL_HTTP_TIMEOUT": min(math.ceil(timeout), 10**6),
        "GDAL_HTTP_MAX_RETRY": 2,
        "GDAL_HTTP_RETRY_DELAY": 0.5,  # GDAL's own 30 s would leave little of the timeout
    }
    settings = {name: value for name, value in defaults.items() if name not in os.environ}
    # TRUE: sidecar files are opened by name, without listing the folder for every file in it.
    env: AbstractContextManager[object] = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE", **settings)
    return env


def ignore_missing_georeference() -> None:
    """Ignore rasterio's NotGeoreferencedWarning: tiles need pixels, not locations.

    TerraTorch's datasets set this filter too; ``catch_warnings`` would restore the filters of other threads.
    """
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


class Header(NamedTuple):
    """Size and bands of a file; descriptions are None where they are damaged."""

    width: int
    height: int
    real: bool
    descriptions: tuple[str | None, ...] | None
    num_bands: int


def _open(path: str, drivers: Sequence[str], **options: str) -> DatasetReader:
    if is_remote(path):
        listing = os.environ.get("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")  # no requests for folders and sidecar files
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN=listing):
            # As rasterio.open, which takes no list of drivers.
            return ensure_env_with_credentials(DatasetReader)(path, driver=drivers, sharing=False, **options)
    mask = f"{path}.msk"
    if os.path.isfile(mask):
        with open(mask, "rb") as file:
            if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                raise ValueError(f"{mask} is no TIFF")  # GDAL would open it as whatever format it is
    # Absolute: GDAL does not take file:a.tif and zip:a.tif for file names.
    return DatasetReader(os.path.abspath(path), driver=drivers, sharing=False, **options)


class Raster:
    """One open raster file, for one thread at a time.

    Args:
        path: File to open.
        georeferenced: Whether its CRS is needed, which takes longer to read than all the rest of a small file.

    Attributes:
        src: The rasterio dataset.
        header: Size and bands.

    Raises:
        Exception: Of any type, if it cannot be opened.
    """

    def __init__(self, path: str, georeferenced: bool = True) -> None:
        self.path = path
        self.src = self._open(georeferenced)
        try:
            self.header = self._read_header()
            self._flags = self.src.mask_flag_enums
            kinds = self.src.colorinterp if any(MaskFlags.alpha in flags for flags in self._flags) else ()
            self._alpha = frozenset(band for band, kind in enumerate(kinds, 1) if kind is ColorInterp.alpha)
        except BaseException:
            self.src.close()
            raise

    def _open(self, georeferenced: bool) -> DatasetReader:
        ending = os.path.splitext(self.path)[1].lower()
        if ending not in GEOTIFF_ENDINGS:
            return _open(self.path, ["VRT"] if ending == ".vrt" else DRIVERS)
        try:
            # With NONE, .aux.xml would not be read.
            return _open(self.path, ["GTiff"], **({} if georeferenced else {"GEOREF_SOURCES": "PAM"}))
        except RasterioIOError:
            if is_remote(self.path):
                raise
            return _open(self.path, PICTURES)  # another format with this ending

    def _read_header(self) -> Header:
        src = self.src
        real = not any(dtype.startswith("complex") for dtype in src.dtypes)
        try:
            descriptions = tuple(src.descriptions)
        except UnicodeDecodeError:
            descriptions = None
        return Header(src.width, src.height, real, descriptions, src.count)

    def close(self) -> None:
        """Close the file."""
        self.src.close()

    def read(
        self, indexes: Sequence[int], window: Window, nodata: float | None, out: NDArray[np.float32]
    ) -> NDArray[np.bool_] | None:
        """Read the pixels of a window and where they hold no data.

        Args:
            indexes: Bands to read, from 1.
            window: Which pixels.
            nodata: Nodata value; None for the file's own. The file's masks, NaN and infinities count in any case.
            out: Filled with the pixels, (..., h, w) for as many bands.

        Returns:
            True where a band lacks data, (C, h, w), or None if nowhere.
        """
        nodata_mask = self._read_values(indexes, window, nodata, out)
        for bands, mask in self._read_masks(indexes, window, nodata):
            if not mask.all():
                nodata_mask = np.zeros((len(indexes), *mask.shape), bool) if nodata_mask is None else nodata_mask
                nodata_mask[bands] |= mask == 0
        return nodata_mask

    def _read_values(
        self, indexes: Sequence[int], window: Window, nodata: float | None, out: NDArray[np.float32]
    ) -> NDArray[np.bool_] | None:
        types = {self.src.dtypes[index - 1] for index in indexes}
        if len(types) > 1:  # virtual rasters; rasterio reads one type at a time
            bands = np.empty((len(indexes), 1, *out.shape[-2:]), np.float32)
            masks = [self._read_values([index], window, nodata, band) for index, band in zip(indexes, bands, strict=True)]
            out[...] = bands.reshape(out.shape)
            return np.concatenate([np.zeros(bands.shape[1:], bool) if mask is None else mask for mask in masks])
        # In the file's own type, then converted: faster than letting GDAL convert, and nodata is compared exactly.
        stored = self.src.read(indexes, window=window)
        with np.errstate(over="ignore"):  # nodata values of float64 files become infinite here
            out[...] = stored.reshape(out.shape)
        nodata_mask = None
        if stored.dtype.kind == "f":
            finite = np.isfinite(stored)
            if stored.dtype.itemsize > out.dtype.itemsize:
                finite &= np.abs(stored) <= np.finfo(np.float32).max
            nodata_mask = None if finite.all() else ~finite
        for band, index in enumerate(indexes):
            declared = nodata is None
            if declared and not self._compares_nodata(index):
                continue
            equal = is_nodata(stored[band], self.src.nodatavals[index - 1] if declared else nodata, declared)
            if equal is not None and equal.any():
                nodata_mask = np.zeros(stored.shape, bool) if nodata_mask is None else nodata_mask
                nodata_mask[band] |= equal
        return nodata_mask

    def _compares_nodata(self, index: int) -> bool:
        """Whether the file's nodata value decides for a band: not where GDAL has a mask, or rasterio rounds the value."""
        flags = self._flags[index - 1]
        return MaskFlags.nodata in flags and MaskFlags.per_dataset not in flags and self.src.dtypes[index - 1] not in ROUNDED

    def _read_masks(
        self, indexes: Sequence[int], window: Window, nodata: float | None
    ) -> Iterator[tuple[int | slice, NDArray[np.uint8]]]:
        """Masks stored in the file or beside it, with the bands each is for; 0 where there is no data."""
        flags = [self._flags[index - 1] for index in indexes]
        for index, flag in zip(indexes, flags, strict=True):
            # An alpha band that is read is data: GDAL calls the fourth band of every 8-bit image alpha, also near infrared.
            alpha = MaskFlags.alpha in flag and not self._alpha.isdisjoint(indexes)
            replaced = MaskFlags.nodata in flag and nodata is not None
            if MaskFlags.per_dataset in flag and not alpha and not replaced:
                yield slice(None), self.src.read_masks(index, window=window)
                break
        for band, (index, flag) in enumerate(zip(indexes, flags, strict=True)):
            rounded = nodata is None and MaskFlags.nodata in flag and self.src.dtypes[index - 1] in ROUNDED
            if not flag or rounded:  # no flag: the band has a mask of its own
                yield band, self.src.read_masks(index, window=window)


def is_nodata(stored: NDArray[Any], value: float | None, declared: bool) -> NDArray[np.bool_] | None:
    """Where stored values are the nodata value, compared as GDAL compares them.

    Args:
        stored: Pixels of a band, in the file's type.
        value: The nodata value; None, NaN and infinities give None, since the latter are nodata in any file.
        declared: Whether the file declares it. GDAL drops the fraction of a value declared by a file of integers.

    Returns:
        True where there is no data, or None if nowhere.
    """
    if value is None or not math.isfinite(value):
        return None
    if stored.dtype.kind != "f":
        whole = int(value) if declared or value == math.floor(value) else None
        return None if whole is None else np.asarray(stored == whole)
    with np.errstate(all="ignore"):
        exact = stored.dtype.type(value)
        if exact == 0:
            return np.asarray(stored == exact)
        ends = sorted((exact * (1 - 4 * TOLERANCE), exact * (1 + 4 * TOLERANCE)))
        if not np.isfinite(2 * exact):  # the sum overflows in GDAL as well, so that any difference is less
            ends = sorted((exact * 0, exact * np.inf))
        near = np.asarray((stored >= ends[0]) & (stored <= ends[1]))
        if near.any():
            some = stored[near]
            equal = np.abs(some - exact) < np.abs(some + exact) * stored.dtype.type(TOLERANCE)
            near[near] = equal | (some == exact)
    return near


class RasterCache:
    """Keeps the most recently used files open.

    Args:
        georeferenced: Whether the CRS of the files is needed.
    """

    def __init__(self, georeferenced: bool = True) -> None:
        self._georeferenced = georeferenced
        self._idle: OrderedDict[int, Raster] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Close all files but those that a read which never ends still uses."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, OrderedDict()
        for raster in idle.values():
            raster.close()

    @contextmanager
    def open(self, path: str) -> Iterator[Raster]:
        """An open file for one thread; it stays open afterwards unless an error is raised."""
        raster = self._pop(path) or Raster(path, self._georeferenced)
        try:
            yield raster
        except BaseException:
            raster.close()
            raise
        surplus = [raster]
        with self._lock:
            if not self._closed:
                self._idle[id(raster)] = raster
                surplus = [self._idle.popitem(last=False)[1]] if len(self._idle) > MAX_OPEN else []
        for old in surplus:
            old.close()

    def _pop(self, path: str) -> Raster | None:
        with self._lock:
            for key in reversed(self._idle):
                if self._idle[key].path == path:
                    return self._idle.pop(key)
        return None
