"""Open raster files: how GDAL is set up, how many stay open, what their pixels are as float32, and which hold data."""

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
"""Formats that hold pixels. Not those whose files name rasters or servers: only a .vrt is read as one. What is left of that
kind: HDF5 and HFA may keep pixels in a further file of this machine, which is named inside of them."""

TOLERANCE = 2 * float(np.finfo(np.float32).eps)
"""GDAL takes a float of either size for the value that means no data if they differ by less than this share of their sum."""

ROUNDED = ("int64", "uint64")
"""Types whose nodata rasterio tells as a float."""

MAX_OPEN = 32
"""Files that stay open while nobody reads from them."""


def gdal_settings(timeout: float) -> AbstractContextManager[object]:
    """GDAL settings for the reads of one thread; what the user has set in the environment stays, but for one.

    ``terratorch fit`` sets ``GDAL_DISABLE_READDIR_ON_OPEN=EMPTY_DIR``, under which files of this machine would lose what
    lies beside them: masks, headers, locations.
    """
    settings = _unless_set(
        VRT_SHARED_SOURCE=0,  # else threads that read two virtual rasters share the files these name
        GDAL_HTTP_TIMEOUT=min(math.ceil(timeout), 10**6),
        GDAL_HTTP_MAX_RETRY=2,
        GDAL_HTTP_RETRY_DELAY=0.5,  # of GDAL's own 30 s little would be left of the time one read may take
    )
    # Nothing is listed, which would be for every file in a folder that is opened, but what belongs to one is looked for.
    scoped: AbstractContextManager[object] = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE", **settings)
    return scoped


def _unless_set(**settings: object) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name not in os.environ}


class Header(NamedTuple):
    """What a file says about itself; descriptions are None where they are damaged."""

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
    _check_mask_file(f"{path}.msk")
    # Absolute: GDAL takes file:a.tif and zip:a.tif for something else than files of such names.
    return DatasetReader(os.path.abspath(path), driver=drivers, sharing=False, **options)


def _check_mask_file(path: str) -> None:
    """Refuse a mask beside a raster that is no TIFF, as GDAL writes them: it would be opened as whatever it is.

    Raises:
        ValueError: If it is none.
    """
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                raise ValueError(f"{path} is no TIFF")


class Raster:
    """One open raster file, for one thread at a time.

    Args:
        path: File to open.
        located: Whether its CRS is wanted, which takes longer to read than all the rest of a small file.

    Attributes:
        header: What it says about itself.

    Raises:
        Exception: Of any type, if it cannot be opened.
    """

    def __init__(self, path: str, located: bool = True) -> None:
        self.path = path
        self.src = self._open(located)
        try:
            self.header = self._read_header()
            self._flags = self.src.mask_flag_enums
            kinds = self.src.colorinterp if any(MaskFlags.alpha in flags for flags in self._flags) else ()
            self._alpha = frozenset(band for band, kind in enumerate(kinds, 1) if kind is ColorInterp.alpha)
        except BaseException:
            self.src.close()
            raise

    def _open(self, located: bool) -> DatasetReader:
        ending = os.path.splitext(self.path)[1].lower()
        if ending not in GEOTIFF_ENDINGS:
            return _open(self.path, ["VRT"] if ending == ".vrt" else DRIVERS)
        try:
            # NONE would leave .aux.xml unread.
            return _open(self.path, ["GTiff"], **({} if located else {"GEOREF_SOURCES": "PAM"}))
        except RasterioIOError:
            if is_remote(self.path):
                raise
            return _open(self.path, PICTURES)  # another format by that name

    def read(
        self, indexes: Sequence[int], window: Window, nodata: float | None, into: NDArray[np.float32]
    ) -> NDArray[np.bool_] | None:
        """Read the pixels of a window, and tell where they hold no data.

        Args:
            indexes: Bands to read, from 1.
            window: Which pixels.
            nodata: Value that means no data; None for the file's own. The file's masks and NaN count in any case.
            into: Filled with the pixels, (..., h, w) for as many bands.

        Returns:
            True where a band lacks data (C, h, w), or None if nothing is lacking.
        """
        lacks = self._read_values(indexes, window, nodata, into)
        for which, mask in self._masks(indexes, window, nodata):
            if not mask.all():
                lacks = np.zeros((len(indexes), *mask.shape), bool) if lacks is None else lacks
                lacks[which] |= mask == 0
        return lacks

    def close(self) -> None:
        """Close the file."""
        self.src.close()

    def _read_header(self) -> Header:
        src = self.src
        real = not any(dtype.startswith("complex") for dtype in src.dtypes)
        try:
            descriptions = tuple(src.descriptions)
        except UnicodeDecodeError:
            descriptions = None
        return Header(src.width, src.height, real, descriptions, src.count)

    def _read_values(
        self, indexes: Sequence[int], window: Window, nodata: float | None, into: NDArray[np.float32]
    ) -> NDArray[np.bool_] | None:
        types = {self.src.dtypes[index - 1] for index in indexes}
        if len(types) > 1:  # virtual rasters; rasterio reads one type at a time
            bands = np.empty((len(indexes), 1, *into.shape[-2:]), np.float32)
            each = [self._read_values([index], window, nodata, band) for index, band in zip(indexes, bands, strict=True)]
            into[...] = bands.reshape(into.shape)
            none = np.zeros(bands.shape[1:], bool)
            return np.concatenate([none if lacks is None else lacks for lacks in each])
        # In the file's own type, then converted: faster than letting GDAL convert, and nodata is compared exactly.
        stored = self.src.read(indexes, window=window)
        with np.errstate(over="ignore"):  # float64 files mark nodata by numbers that become infinite here
            into[...] = stored.reshape(into.shape)
        lacks = None
        if stored.dtype.kind == "f":
            finite = np.isfinite(stored)
            if stored.dtype.itemsize > into.dtype.itemsize:
                finite &= np.abs(stored) <= np.finfo(np.float32).max
            lacks = None if finite.all() else ~finite
        for band, index in enumerate(indexes):
            declared = nodata is None
            if declared and not self._compares_nodata(index):
                continue
            hit = is_nodata(stored[band], self.src.nodatavals[index - 1] if declared else nodata, declared)
            if hit is not None and hit.any():
                lacks = np.zeros(stored.shape, bool) if lacks is None else lacks
                lacks[band] |= hit
        return lacks

    def _compares_nodata(self, index: int) -> bool:
        """Whether a band lacks data where it has the file's own value: not where GDAL has a mask, or rasterio rounds it."""
        flags = self._flags[index - 1]
        return MaskFlags.nodata in flags and MaskFlags.per_dataset not in flags and self.src.dtypes[index - 1] not in ROUNDED

    def _masks(
        self, indexes: Sequence[int], window: Window, nodata: float | None
    ) -> Iterator[tuple[int | slice, NDArray[np.uint8]]]:
        """Masks stored in the file or beside it, and which of the bands each is for; 0 where there is no data."""
        flags = [self._flags[index - 1] for index in indexes]
        for index, of in zip(indexes, flags, strict=True):
            # An alpha band that is read is data: GDAL calls the fourth band of every 8-bit image one, near infrared too.
            alpha = MaskFlags.alpha in of and not self._alpha.isdisjoint(indexes)
            replaced = MaskFlags.nodata in of and nodata is not None
            if MaskFlags.per_dataset in of and not alpha and not replaced:
                yield slice(None), self.src.read_masks(index, window=window)
                break
        for band, (index, of) in enumerate(zip(indexes, flags, strict=True)):
            rounded = nodata is None and MaskFlags.nodata in of and self.src.dtypes[index - 1] in ROUNDED
            if not of or rounded:  # the band has a mask of its own
                yield band, self.src.read_masks(index, window=window)


def is_nodata(stored: NDArray[Any], value: float | None, declared: bool) -> NDArray[np.bool_] | None:
    """Where stored values are the one that means no data, compared as GDAL does.

    Args:
        stored: Pixels of a band, in the file's type.
        value: The value; for None, NaN and infinities, which are no data in any file, the answer is None.
        declared: Whether the file says so. GDAL drops the fraction of what a file of integers declares.

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
        if not np.isfinite(2 * exact):  # so is the sum, for GDAL as well, of which any difference is less
            ends = sorted((exact * 0, exact * np.inf))
        near = np.asarray((stored >= ends[0]) & (stored <= ends[1]))
        if near.any():
            some = stored[near]
            equal = np.abs(some - exact) < np.abs(some + exact) * stored.dtype.type(TOLERANCE)
            near[near] = equal | (some == exact)
    return near


class OpenFiles:
    """Keeps the files used last open, for the next of their windows.

    Args:
        located: Whether the CRS of the files is wanted.
    """

    def __init__(self, located: bool = True) -> None:
        self._located = located
        self._idle: OrderedDict[int, Raster] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Close all files but those that a read which never ends still holds."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, OrderedDict()
        for raster in idle.values():
            raster.close()

    @contextmanager
    def borrow(self, path: str) -> Iterator[Raster]:
        """Lend a file to one thread; after an error it is closed."""
        raster = self._take(path) or Raster(path, self._located)
        try:
            yield raster
        except BaseException:
            raster.close()
            raise
        self._give_back(raster)

    def _take(self, path: str) -> Raster | None:
        with self._lock:
            for key in reversed(self._idle):
                if self._idle[key].path == path:
                    return self._idle.pop(key)
        return None

    def _give_back(self, raster: Raster) -> None:
        surplus = [raster]
        with self._lock:
            if not self._closed:
                self._idle[id(raster)] = raster
                surplus = [self._idle.popitem(last=False)[1]] if len(self._idle) > MAX_OPEN else []
        for old in surplus:
            old.close()


def accept_files_without_georeference() -> None:
    """Pixels are wanted, not places: a file without georeference is as good as any.

    TerraTorch's datasets set this filter too; ``catch_warnings`` would restore the filters of other threads.
    """
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
