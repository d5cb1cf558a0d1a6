"""Turns exceptions raised while reading a file into counted skips, and tells damaged files from bugs in the reading code."""

from __future__ import annotations

import os
import traceback
import zipfile
import zlib
from collections.abc import Sequence

import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError, RasterioError

from terratorch_simpler.data.paths import PICTURE_ENDINGS, RASTER_ENDINGS, is_remote, os_error_reason
from terratorch_simpler.data.source import Skip

DETAIL_LENGTH = 200

READ_ERRORS = (RasterioError, CPLE_BaseError, CRSError, OSError, UnicodeError, EOFError, zipfile.BadZipFile, zlib.error)
"""Raised for damaged files, whatever code reads them."""

GDAL_ENDINGS = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".vrt", ".img")
"""Files that GDAL can check for damage."""

READERS = (
    *("h5py", "h5netcdf", "netCDF4", "zarr", "numcodecs", "zipfile", "gzip", "tarfile", "pickle", "pyarrow"),
    *("numpy.lib.format", "numpy.lib.npyio", "numpy.lib._format_impl", "numpy.lib._npyio_impl"),
)
"""Modules that read files of other kinds."""


class FileChangedError(Exception):
    """The file is not the one that was indexed."""


def skip_for(path: str, error: Exception, opened: bool, position: int = -1) -> Skip:
    """The skip that counts an exception.

    Args:
        path: The file that was read.
        error: What was raised. Any type: rasterio lets errors of GDAL through that are none of its own, NumPy raises
            ValueError and IndexError on what does not fit, Python OverflowError and UnicodeError.
        opened: Whether the file was opened before: then it is a raster, whatever its name.
        position: Position of the tile in the stream; -1 for the whole file.
    """
    if isinstance(error, FileChangedError):
        return Skip(position, "changed", path, bad=True)
    cause = error.__cause__ or error  # rasterio: "Read failed. See previous exception for details."
    detail = " ".join(f"{type(cause).__name__}: {cause}".split())[:DETAIL_LENGTH]
    reason = _reason(path, error)
    # A text file in a folder of rasters is no damage, unless its name says that it is a raster.
    is_raster = opened or is_remote(path) or path.lower().endswith(RASTER_ENDINGS + PICTURE_ENDINGS)
    if reason == "unreadable" and not is_raster:
        return Skip(position, "no raster", path, bad=False, detail=detail)
    return Skip(position, reason, path, bad=True, detail=detail)


def _reason(path: str, error: Exception) -> str:
    if is_remote(path):
        return "unreadable"
    try:
        # Not open(): it would wait for the writer of a named pipe.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            empty = not os.read(handle, 1)
        finally:
            os.close(handle)
    except OSError as err:
        return os_error_reason(err)
    if empty:
        return "empty file"
    return "name is not UTF-8" if isinstance(error, UnicodeEncodeError) else "unreadable"


def is_damage(error: BaseException, files: Sequence[str]) -> bool:
    """Whether an exception raised while a dataset read a sample means that one of its files is damaged.

    Image readers raise exceptions of any type on damaged files, and so does the code that uses their output; therefore
    GDAL reads the files again. For files that GDAL cannot read, the module that raised the exception decides.

    Args:
        error: What was raised.
        files: Files of the sample, as far as they are known.
    """
    if isinstance(error, READ_ERRORS):
        return True
    rasters = [file for file in files if file.lower().endswith(GDAL_ENDINGS) and os.path.exists(file)]
    if rasters:
        return not all(map(_is_whole, rasters))
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frames[-1] == reader or frames[-1].startswith(f"{reader}.") for reader in READERS)


def _is_whole(file: str) -> bool:
    try:
        with rasterio.open(file) as source:
            source.read()
    except Exception:
        return False
    return True
