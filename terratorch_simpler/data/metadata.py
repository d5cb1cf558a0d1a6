"""Acquisition date and location of a tile, in the units that encoders with time and location take."""

from __future__ import annotations

import re
from datetime import date

from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.warp import transform
from rasterio.windows import Window

DATE_TAGS = (
    ("IMAGERY", "ACQUISITIONDATETIME"),  # GDAL's own name for the imagery of many satellites
    (None, "SENSING_TIME"),  # HLS
    (None, "DATE_ACQUIRED"),  # Landsat
    (None, "TIFFTAG_DATETIME"),
)
"""Tags with the acquisition date, most reliable first; the last may be the time of writing."""


def date_from_tags(src: DatasetReader) -> tuple[int, int] | None:
    """Year, and day of the year from 0; None if no tag holds a date."""
    for namespace, name in DATE_TAGS:
        match = re.match(r"\s*(\d{4})[-:/]?(\d{2})[-:/]?(\d{2})", src.tags(ns=namespace).get(name, ""))
        if match:
            try:
                day = date(*map(int, match.groups()))
            except ValueError:
                continue
            return day.year, day.timetuple().tm_yday - 1
    return None


def center(src: DatasetReader, window: Window) -> tuple[float, float] | None:
    """Latitude and longitude of a window's center in degrees.

    None for a file without georeference, for a CRS that is none of the Earth's, and for pixels beside the Earth, as the
    corners of geostationary images.
    """
    if src.crs is None or src.transform == Affine.identity():
        return None
    x, y = src.xy(window.row_off + window.height / 2, window.col_off + window.width / 2, offset="ul")
    try:
        (longitude,), (latitude,) = transform(src.crs, "EPSG:4326", [x], [y])
    except Exception:  # GDAL raises errors that are none of rasterio's
        return None
    if not (abs(latitude) <= 90 and abs(longitude) <= 360):  # False for NaN
        return None
    return latitude, (longitude + 180) % 360 - 180 if abs(longitude) > 180 else longitude
