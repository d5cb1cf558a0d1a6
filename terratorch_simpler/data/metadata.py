"""When and where a tile was taken, in the numbers that encoders with time and location take."""

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
"""Where GeoTIFF files say when they were taken, the surest first; the last may be the time of writing."""


def day_in_tags(src: DatasetReader) -> tuple[int, int] | None:
    """Year, and day of the year from 0, or None if no tag tells."""
    for namespace, name in DATE_TAGS:
        written = re.match(r"\s*(\d{4})[-:/]?(\d{2})[-:/]?(\d{2})", src.tags(ns=namespace).get(name, ""))
        if written:
            try:
                day = date(*map(int, written.groups()))
            except ValueError:
                continue
            return day.year, day.timetuple().tm_yday - 1
    return None


def centre(src: DatasetReader, window: Window) -> tuple[float, float] | None:
    """Latitude and longitude of a window's centre in degrees, or None for a file that does not know its place.

    Nor does one whose CRS is none of the Earth's, or whose pixels lie beside it, as the corners of geostationary images.
    """
    if src.crs is None or src.transform == Affine.identity():
        return None
    x, y = src.xy(window.row_off + window.height / 2, window.col_off + window.width / 2, offset="ul")
    try:
        (longitude,), (latitude,) = transform(src.crs, "EPSG:4326", [x], [y])
    except Exception:  # errors of GDAL that are none of rasterio's
        return None
    if not (abs(latitude) <= 90 and abs(longitude) <= 360):  # False for NaN
        return None
    return latitude, (longitude + 180) % 360 - 180 if abs(longitude) > 180 else longitude
