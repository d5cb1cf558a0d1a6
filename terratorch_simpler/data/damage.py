"""Tells a damaged file from an error in the code that reads it."""

from __future__ import annotations

import os
import traceback
import zipfile
import zlib
from collections.abc import Sequence

import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError, RasterioError

READ_ERRORS = (RasterioError, CPLE_BaseError, CRSError, OSError, UnicodeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What readers raise on damaged files, whoever calls them."""

RASTERS = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".vrt", ".img")
"""Files that GDAL reads, so that it can be asked whether they are whole."""

READERS = (
    *("h5py", "h5netcdf", "netCDF4", "zarr", "numcodecs", "zipfile", "gzip", "tarfile", "pickle", "pyarrow"),
    *("numpy.lib.format", "numpy.lib.npyio", "numpy.lib._format_impl", "numpy.lib._npyio_impl"),
)
"""Modules that read files of other kinds."""


def is_damage(error: BaseException, files: Sequence[str]) -> bool:
    """Whether an error that was raised while a sample was read means that a file of it is damaged.

    Readers of images raise errors of any type on damaged files, as the code around them does on what they made of these;
    so the files themselves are asked. For files that GDAL cannot read the place of the error decides.

    Args:
        error: What was raised.
        files: Files of the sample, as far as they are known.
    """
    if isinstance(error, READ_ERRORS):
        return True
    rasters = [file for file in files if file.lower().endswith(RASTERS) and os.path.exists(file)]
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
