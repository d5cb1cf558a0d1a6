"""The one place that turns whatever a file makes a library raise into a counted reason."""

from __future__ import annotations

import os

from terratorch_simpler.data.paths import PICTURE_ENDINGS, RASTER_ENDINGS, is_remote
from terratorch_simpler.data.source import Unusable, error_reason

DETAIL_LENGTH = 200


class FileChangedError(Exception):
    """A file is another than the one that was indexed."""


def unusable(path: str, error: Exception, opened: bool) -> Unusable:
    """The file or window that cannot be used.

    Args:
        path: The file that was read.
        opened: Whether it could be opened before: then it is a raster, whatever its name.
        error: What was raised. Any type: rasterio lets errors of GDAL through that are none of its own, NumPy raises
            ValueError and IndexError on what does not fit, Python OverflowError and UnicodeError.
    """
    cause = error.__cause__ or error  # rasterio: "Read failed. See previous exception for details."
    detail = " ".join(f"{type(cause).__name__}: {cause}".split())[:DETAIL_LENGTH]
    if isinstance(error, FileChangedError):
        return Unusable(path, "changed", True)
    reason = _reason(path, error)
    # A file that nobody calls a raster is no damaged one.
    called_one = opened or is_remote(path) or path.lower().endswith(RASTER_ENDINGS + PICTURE_ENDINGS)
    none = reason == "unreadable" and not called_one
    return Unusable(path, "no raster", False, detail) if none else Unusable(path, reason, True, detail)


def _reason(path: str, error: Exception) -> str:
    if is_remote(path):
        return "unreadable"
    try:
        # Not open(): for a named pipe it would wait for somebody to write.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            empty = not os.read(handle, 1)
        finally:
            os.close(handle)
    except OSError as err:
        return error_reason(err)
    if empty:
        return "empty file"
    return "name is not UTF-8" if isinstance(error, UnicodeEncodeError) else "unreadable"
