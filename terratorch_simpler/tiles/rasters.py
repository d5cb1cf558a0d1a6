"""Open GeoTIFF files: how GDAL is set up, how many stay open, what their pixels are as float32, why they cannot be read."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from terratorch_simpler.tiles.paths import is_remote

DAMAGE = (RasterioError, CRSError, OSError, UnicodeError)
"""What rasterio raises on damaged files; the last for band descriptions, and for names of files that are no text."""

MAX_OPEN = 32
"""Files that stay open while nobody reads from them."""


def gdal_settings(timeout: float) -> AbstractContextManager[object]:
    """GDAL settings for the reads of one thread; what the user has set in the environment stays."""
    return _unless_set(
        GDAL_DISABLE_READDIR_ON_OPEN="TRUE",  # else the folder is listed for every file in it that is opened
        GDAL_HTTP_TIMEOUT=math.ceil(timeout),
        GDAL_HTTP_MAX_RETRY=2,
        GDAL_HTTP_RETRY_DELAY=0.5,  # of GDAL's own 30 s little would be left of the time one read may take
    )


def _unless_set(**settings: object) -> AbstractContextManager[object]:
    scoped: AbstractContextManager[object] = rasterio.Env(
        **{name: value for name, value in settings.items() if name not in os.environ}
    )
    return scoped


class Raster:
    """One open GeoTIFF file, for one thread at a time.

    Args:
        path: File to open. Nothing but the GeoTIFF driver is tried: files that name other files are not followed.

    Raises:
        RasterioError: If it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if is_remote(path):
            with _unless_set(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):  # no requests for folders and sidecar files
                self.src = rasterio.open(path, driver="GTiff")  # with the credentials that URLs need
        else:
            self.src = DatasetReader(path, driver="GTiff", sharing=False)
        # An alpha band is no mask here: GDAL declares the fourth band of every 8-bit image one, near infrared as well.
        self._has_mask = any(
            MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags for flags in self.src.mask_flag_enums
        )

    def read(
        self, indexes: Sequence[int], window: Window, nodata: float | None, into: NDArray[np.float32]
    ) -> NDArray[np.bool_] | None:
        """Read the pixels of a window, and tell where they hold no data.

        Args:
            indexes: Bands to read, from 1.
            window: Which pixels.
            nodata: Value that means no data; None for the file's own. The file's mask and NaN count in any case.
            into: Filled with the pixels, (..., h, w) for as many bands.

        Returns:
            True where a band lacks data (C, h, w), or None if nothing is lacking.
        """
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
        for band, value in enumerate(self.src.nodatavals[index - 1] if nodata is None else nodata for index in indexes):
            if value is None or not math.isfinite(value):
                continue
            with np.errstate(over="ignore"):
                hit = stored[band] == (stored.dtype.type(value) if stored.dtype.kind == "f" else value)
            if hit.any():
                lacks = np.zeros(stored.shape, bool) if lacks is None else lacks
                lacks[band] |= hit
        if self._has_mask:
            masked = self.src.read_masks(indexes[0], window=window) == 0
            if masked.any():
                lacks = masked | (np.zeros(stored.shape, bool) if lacks is None else lacks)
        return lacks

    def close(self) -> None:
        """Close the file."""
        self.src.close()


class OpenFiles:
    """Keeps the files used last open, for the next of their windows."""

    def __init__(self) -> None:
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
        raster = self._take(path) or Raster(path)
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


def why_unreadable(path: str) -> str:
    """Short reason why a file that GDAL refused could not be read."""
    if is_remote(path):
        return "unreadable"
    try:
        # Not open(): for a named pipe it would wait for somebody to write.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            return "unreadable" if os.read(handle, 1) else "empty file"
        finally:
            os.close(handle)
    except FileNotFoundError:
        return "vanished"
    except PermissionError:
        return "permission denied"
    except OSError:
        return "unreadable"
