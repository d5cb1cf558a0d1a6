"""Small raster files of every kind that GDAL writes, and of many that it does not: what users' folders hold.

``KINDS`` maps file names to the functions that write them; odd names are in a folder of their own.
"""

import gzip
import logging
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from scipy.io import netcdf_file

from tests.rasters import PLACE, draw, truncate, write

HEIGHT, WIDTH = 80, 96
TILED = {"tiled": True, "blockxsize": 32, "blockysize": 32}
MASK = np.where(np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) < 60, 0, 255).astype("uint8")
NOWHERE = {"crs": None, "transform": None}
DATED = {"TIFFTAG_DATETIME": "2020:05:06 10:11:12"}

KINDS: dict[str, Callable[[Path], object]] = {}


def write_all(folder: Path) -> dict[str, Path | None]:
    """Write a file of every kind.

    Args:
        folder: Made if it is not there.

    Returns:
        The path of each by its name; None where the installed GDAL or the file system cannot write it.
    """
    folder = Path(folder)
    (folder / "names").mkdir(parents=True, exist_ok=True)
    written: dict[str, Path | None] = {}
    logger = logging.getLogger("rasterio")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            for name, make in KINDS.items():
                path = folder / name
                try:
                    make(path)
                    written[name] = path
                except (RasterioError, OSError, Unsupported):
                    path.unlink(missing_ok=True)
                    written[name] = None
    finally:
        logger.setLevel(level)
    return written


class Unsupported(Exception):
    """The installed GDAL wrote something else than was asked for."""


def pixels(dtype="int16", bands=2, height=HEIGHT, width=WIDTH):
    return draw(bands, height, width, dtype=dtype)


def put(array, where, value):
    array[where] = value
    return array


def kind(name, array=None, **options):
    """Register a GeoTIFF file."""
    array = pixels() if array is None else array
    KINDS[name] = lambda path: write(path, array.copy(), **options)


def register(*names):
    """Register a function that writes a file; with several names it is called for each."""

    def decorate(function):
        for name in names:
            KINDS[name] = function
        return function

    return decorate


def copy_as(driver, array, options=None, **profile):
    """A function that writes an array by CreateCopy, as most formats other than GeoTIFF are written."""

    def make(path):
        source = path.with_name(f"{path.name}.source")
        try:
            write(source, array, **profile)
            rasterio.shutil.copy(source, path, driver=driver, strict=False, **(options or {}))
        except Exception as err:  # CPLE errors of drivers have no common public type
            raise Unsupported(str(err)) from err
        finally:
            source.unlink(missing_ok=True)
            source.with_name(f"{source.name}.aux.xml").unlink(missing_ok=True)

    return make


# TIFF by hand, for what GDAL refuses to write

TYPES = {"uint8": (8, 1), "int8": (8, 2), "uint16": (16, 1), "float32": (32, 3), "int64": (64, 2), "uint64": (64, 1)}


def tiff(*images):
    """Bytes of an uncompressed TIFF with an image a page: (pixels (C, H, W), tags), the tags as {number: value}."""
    out = bytearray(struct.pack("<2sHI", b"II", 42, 8))
    for number, (array, tags) in enumerate(images):
        count, height, width = array.shape
        bits, sample_format = TYPES[array.dtype.name]
        entries = {
            256: width,
            257: height,
            258: [bits] * count,
            259: 1,
            262: 1,
            273: None,
            277: count,
            278: height,
            279: array.nbytes,
            284: 1,
            339: [sample_format] * count,
            **({338: [0] * (count - 1)} if count > 1 else {}),
            **tags,
        }
        start = len(out)
        free = start + 2 + 12 * len(entries) + 4
        extra = bytearray()
        packed = []
        data = np.ascontiguousarray(array.transpose(1, 2, 0)).tobytes()
        long_values = sum(_size(value) for value in entries.values() if _size(value) > 4)
        for tag, value in sorted(entries.items()):
            value = free + long_values if tag == 273 else value
            code, amount, raw = _field(value)
            if len(raw) > 4:
                raw, place = struct.pack("<I", free + len(extra)), raw
                extra += place
            packed.append(struct.pack("<HHI", tag, code, amount) + raw.ljust(4, b"\0"))
        after = free + long_values + len(data)
        following = 0 if number + 1 == len(images) else after
        out += struct.pack("<H", len(packed)) + b"".join(packed) + struct.pack("<I", following) + extra + data
    return bytes(out)


def _field(value):
    if isinstance(value, str):
        raw = value.encode() + b"\0"
        return 2, len(raw), raw + b"\0" * (len(raw) % 2)
    values = value if isinstance(value, list) else [value]
    small = isinstance(value, list)
    return (3 if small else 4), len(values), struct.pack(f"<{len(values)}{'H' if small else 'I'}", *values)


def _size(value):
    return 4 if value is None else len(_field(value)[2])


def hand_made(name, array, nodata):
    """Register a TIFF file with any text as its nodata value."""
    KINDS[name] = lambda path: path.write_bytes(tiff((array, {42113: nodata})))


def set_tags(data, **values):
    """TIFF bytes with the values of tags in the first page replaced: width and height."""
    data = bytearray(data)
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        tag, _, amount = struct.unpack_from("<HHI", data, at)
        if tag in (256, 257):
            struct.pack_into("<HII", data, at + 2, 4, amount, values["width" if tag == 256 else "height"])
    return bytes(data)


# Types of pixels

for _type in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"):
    kind(f"{_type}.tif", pixels(_type))
    if _type.startswith(("u", "i")):
        _limits = np.iinfo(_type)
        kind(f"{_type}_limits.tif", put(put(pixels(_type), np.s_[0, 0], _limits.max), np.s_[1, 1], _limits.min))
kind("int64.tif", put(pixels("int64"), np.s_[0, 0, :4], [2**62, -(2**62), 2**53 + 1, 2**24 + 1]))
kind("uint64.tif", put(pixels("uint64"), np.s_[0, 0, :4], [2**63, 2**64 - 1, 2**53 + 1, 2**24 + 1]))
kind("complex64.tif", pixels("complex64"))
kind("complex128.tif", pixels("complex128"))
kind("float16.tif", pixels("float32"), nbits=16)
kind("float24.tif", pixels("float32") / 7, nbits=24)
kind("nbits1.tif", pixels("uint8") % 2, nbits=1)
kind("nbits4.tif", pixels("uint8") % 16, nbits=4)
kind("nbits12.tif", pixels("uint16") * 20, nbits=12)
kind("bands_300.tif", pixels("uint8", 300, 40, 48))
kind("bands_300_pixel_interleaved.tif", pixels("uint8", 300, 40, 48), interleave="pixel", compress="deflate")


@register("complex_int16.tif")
def _complex_int(path):
    shape = {"width": WIDTH, "height": HEIGHT, "count": 1, "dtype": "complex_int16"}
    with rasterio.open(path, "w", driver="GTiff", **shape, **PLACE) as target:
        target.write(pixels("complex64", 1))


# Compression and layout

for _name in ("lzw", "deflate", "zstd", "lzma", "packbits", "lerc", "lerc_zstd", "lerc_deflate"):
    kind(f"{_name}.tif", pixels(), compress=_name, **TILED)
kind("lerc_float32.tif", pixels("float32") / 7, compress="lerc", **TILED)
kind("lerc_nan.tif", put(pixels("float32"), np.s_[0, :9], np.nan), compress="lerc", **TILED)
kind("lzw_predictor2.tif", pixels(), compress="lzw", predictor=2)
kind("deflate_predictor2_uint8.tif", pixels("uint8", 3), compress="deflate", predictor=2, interleave="pixel")
kind("lzw_predictor3.tif", pixels("float32") / 7, compress="lzw", predictor=3, **TILED)
kind("zstd_predictor3_float64.tif", pixels("float64") / 7, compress="zstd", predictor=3)
kind("webp_lossless.tif", pixels("uint8", 3), compress="webp", webp_lossless="yes", **TILED)
kind("webp_lossless_rgba.tif", pixels("uint8", 4), compress="webp", webp_lossless="yes", interleave="pixel")
kind("jpeg_ycbcr.tif", pixels("uint8", 3), compress="jpeg", photometric="ycbcr", interleave="pixel", **TILED)
kind("jpeg_ycbcr_mask.tif", pixels("uint8", 3), mask=MASK, compress="jpeg", photometric="ycbcr", interleave="pixel")
kind("jpeg_grey.tif", pixels("uint8", 1), compress="jpeg")
kind("ccittfax4.tif", pixels("uint8", 1) % 2, compress="ccittfax4", nbits=1)
kind("ccittrle_white.tif", pixels("uint8", 1) % 2, compress="ccittrle", nbits=1, photometric="miniswhite")
kind("miniswhite.tif", pixels("uint8", 1), photometric="miniswhite")
kind("pixel_interleaved.tif", pixels(bands=5), interleave="pixel")
kind("band_interleaved.tif", pixels(bands=5), interleave="band")
kind("strips.tif", pixels(), blockysize=7)
kind("one_strip.tif", pixels(), blockysize=HEIGHT)
kind("tiles.tif", pixels(), **TILED)
kind("tiles_larger_than_file.tif", pixels(), tiled=True, blockxsize=256, blockysize=256)
kind("bigtiff.tif", pixels(), bigtiff="yes")
kind("big_endian.tif", pixels(), endianness="big")
kind("one_wide.tif", pixels(width=1))
kind("one_high.tif", pixels(height=1))
kind("one_by_one.tif", pixels(height=1, width=1))
kind("two_by_two.tif", pixels(height=2, width=2))
kind("gtiff_ending.GTiff", pixels())
kind("upper_case.TIF", pixels())
kind("btf_ending.btf", pixels(), bigtiff="yes")


def _sparse(path, size, block, nodata, count=1):
    shape = {"width": size, "height": size, "count": count, "dtype": "uint8", "nodata": nodata}
    options = {"tiled": True, "blockxsize": block, "blockysize": block, "compress": "deflate", "sparse_ok": True}
    with rasterio.open(path, "w", driver="GTiff", **shape, **options, **PLACE) as target:
        target.write(pixels("uint8", count, 64, 64), window=rasterio.windows.Window(0, 0, 64, 64))


KINDS["sparse.tif"] = lambda path: _sparse(path, 256, 64, None, count=2)
KINDS["sparse_nodata.tif"] = lambda path: _sparse(path, 256, 64, 0, count=2)
KINDS["sparse_huge.tif"] = lambda path: _sparse(path, 40000, 1024, 0)
KINDS["sparse_huge_zeros.tif"] = lambda path: _sparse(path, 40000, 1024, None)


@register("constant_huge_lerc.tif", "constant_huge_lerc_zstd.tif")
def _constant(path):
    compress = "lerc_zstd" if "zstd" in path.name else "lerc"
    options = {"tiled": True, "blockxsize": 1024, "blockysize": 1024, "compress": compress}
    shape = {"width": 8192, "height": 8192, "count": 1, "dtype": "float32"}
    row = np.full((1, 1024, 8192), 2.5, "float32")
    with rasterio.open(path, "w", driver="GTiff", **shape, **options, **PLACE) as target:
        for top in range(0, 8192, 1024):
            target.write(row, window=rasterio.windows.Window(0, top, 8192, 1024))


# Places and dates

kind("dated.tif", tags=DATED)
kind("date_of_no_day.tif", tags={"TIFFTAG_DATETIME": "2020:02:31 00:00:00"})
kind("date_sensing_time.tif", tags={"SENSING_TIME": "2021-12-31T10:00:00Z", **DATED})
kind("rotated.tif", transform=PLACE["transform"] @ rasterio.Affine.rotation(30), tags=DATED)
kind("south_up.tif", transform=rasterio.Affine(30, 0, 500000, 0, 30, 5000000), tags=DATED)
kind("nowhere.tif", tags=DATED, **NOWHERE)
kind("crs_without_transform.tif", transform=None, tags=DATED)
kind("transform_without_crs.tif", crs=None, tags=DATED)
kind("nan_transform.tif", transform=rasterio.Affine(*[float("nan")] * 6), tags=DATED)
kind("infinite_transform.tif", transform=rasterio.Affine(1e308, 0, 1e308, 0, -1e308, 1e308), tags=DATED)
kind("local_crs.tif", crs='LOCAL_CS["x",UNIT["metre",1]]', tags=DATED)
kind("beyond_the_pole.tif", crs="EPSG:4326", transform=rasterio.Affine(0.5, 0, 10, 0, -0.5, 120), tags=DATED)
kind("longitudes_to_360.tif", crs="EPSG:4326", transform=rasterio.Affine(1, 0, 150, 0, -1, 40), tags=DATED)
kind("web_mercator.tif", crs="EPSG:3857", transform=rasterio.Affine(30, 0, 1e6, 0, -30, 6e6), tags=DATED)
kind(
    "geostationary.tif",  # the corners look past the Earth
    crs="+proj=geos +h=35786023 +lon_0=-75 +sweep=x",
    transform=rasterio.Affine(147000, 0, -7000000, 0, -176000, 7000000),
    tags=DATED,
)


@register("gcps.tif")
def _gcps(path):
    corners = [(0, 0, 10, 50), (0, WIDTH, 11, 50), (HEIGHT, 0, 10, 49), (HEIGHT, WIDTH, 11, 49)]
    points = [GroundControlPoint(row, column, x, y) for row, column, x, y in corners]
    shape = {"width": WIDTH, "height": HEIGHT, "count": 2, "dtype": "int16"}
    with rasterio.open(path, "w", driver="GTiff", gcps=points, crs="EPSG:4326", **shape) as target:
        target.write(pixels())
        target.update_tags(**DATED)


# Masks and alpha

kind("mask_internal.tif", mask=MASK)
kind("mask_internal_nodata.tif", mask=MASK, nodata=7)
kind("mask_internal_nan.tif", put(pixels("float32"), np.s_[0, 70:], np.nan), mask=MASK, nodata=float("nan"))
kind("mask_of_nothing.tif", mask=np.zeros_like(MASK))
kind("rgba.tif", put(pixels("uint8", 4), np.s_[3, :30], 0))
kind("rgba_half_transparent.tif", put(put(pixels("uint8", 4), np.s_[3, :30], 1), np.s_[3, 40:50, :40], 0))
kind("rgba_transparent.tif", put(pixels("uint8", 4), np.s_[3], 0))
kind("rgba_nodata.tif", put(pixels("uint8", 4), np.s_[3, :30], 0), nodata=9)
kind("rgba_mask.tif", put(pixels("uint8", 4), np.s_[3, :30], 0), mask=MASK)
kind("rgba_uint16.tif", put(pixels("uint16", 4), np.s_[3, :30], 0), photometric="rgb", alpha="yes")
kind("rgba_nir.tif", put(pixels("uint8", 4), np.s_[3, :30], 0), photometric="minisblack")
kind("alpha_after_four_bands.tif", put(pixels("uint16", 5), np.s_[4, :30], 0), photometric="rgb", alpha="yes")
kind("grey_alpha.tif", put(pixels("uint8", 2), np.s_[1, :30], 0), photometric="minisblack", alpha="yes")


@register("mask_sidecar.tif")
def _mask_sidecar(path):
    write(path, pixels())
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as target:
        target.write_mask(MASK)


def _band_masks(bands=3):
    return np.stack([np.roll(MASK, 25 * band, axis=1) for band in range(bands)])


@register("mask_per_band_sidecar.tif")
def _band_mask_sidecar(path):
    write(path, pixels("uint8", 3))
    tags = {f"INTERNAL_MASK_FLAGS_{band}": "0" for band in (1, 2, 3)}
    write(path.with_name(f"{path.name}.msk"), _band_masks(), tags=tags, **NOWHERE)


@register("mask_per_band_internal.tif")
def _band_mask_internal(path):
    path.write_bytes(tiff((pixels("uint8", 3), {}), (_band_masks(), {254: 4, 262: 4})))


@register("palette.tif")
def _palette(path):
    write(path, pixels("uint8", 1), photometric="palette")
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {value: (value, 255 - value, 7, 255) for value in range(256)})


# Nodata

kind("nodata.tif", put(pixels(), np.s_[0, :30], -9999), nodata=-9999)
kind("nodata_most.tif", put(pixels(), np.s_[1, 10:], -9999), nodata=-9999)
kind("nodata_all.tif", put(pixels(), np.s_[...], -9999), nodata=-9999)
kind("nodata_one_band_all.tif", put(pixels(), np.s_[1], -9999), nodata=-9999)
kind("nodata_fraction.tif", put(pixels("uint8"), np.s_[0, :20], 0), nodata=0.5)
kind("nodata_fraction_3.tif", put(pixels("uint8"), np.s_[0, :20], 3), nodata=3.7)
kind("nodata_nan.tif", put(pixels("float32"), np.s_[0, :30], np.nan), nodata=float("nan"))
kind("nodata_infinite.tif", put(pixels("float32"), np.s_[0, :30], np.inf), nodata=float("inf"))
kind("nodata_minus_infinite.tif", put(pixels("float32"), np.s_[0, :30], -np.inf), nodata=float("-inf"))
kind("nan_undeclared.tif", put(put(pixels("float32"), np.s_[0, :9], np.nan), np.s_[1, 40, 40:50], np.inf))
kind(
    "nodata_lowest_float32.tif",
    put(pixels("float32"), np.s_[0, :30], np.finfo("float32").min),
    nodata=-3.4028234663852886e38,
)
kind(
    "nodata_lowest_float64.tif",
    put(pixels("float64"), np.s_[0, :30], np.finfo("float64").min),
    nodata=-1.7976931348623157e308,
)
kind("float64_extremes.tif", put(put(pixels("float64"), np.s_[0, :9], 1e300), np.s_[1, 9, :3], [1e39, -1e39, 1e-300]))
kind(
    "lowest_undeclared_beside_nan.tif",
    put(put(pixels("float32", 1), np.s_[0, :8], -3.4028235e38), np.s_[0, 20, ::7], np.nan),
)
kind("nodata_values.tif", put(pixels("uint8", 3), np.s_[:, :30], 5), tags={"NODATA_VALUES": "5 5 5"})
kind(
    "nodata_values_and_nodata.tif",
    put(put(pixels("uint8", 3), np.s_[:, :30], 5), np.s_[:, 40:60, :50], 9),
    tags={"NODATA_VALUES": "5 5 5"},
    nodata=9,
)
kind("nodata_int64.tif", put(pixels("int64"), np.s_[0, :30], -9999), nodata=-9999)
for _name, _nodata in (("minus_9999", "-9999"), ("256", "256"), ("nan", "nan"), ("inf", "inf"), ("text", "no number")):
    hand_made(f"nodata_uint8_{_name}.tif", put(pixels("uint8"), np.s_[0, :30], 0), _nodata)
hand_made("nodata_int8_255.tif", put(pixels("int8"), np.s_[0, :30], -1), "255")
hand_made("nodata_float32_from_float64.tif", put(pixels("float32"), np.s_[0, :30], np.inf), "-1.7976931348623157e+308")
hand_made("nodata_float32_rounded.tif", put(pixels("float32"), np.s_[0, :30], np.finfo("f4").min), "-3.40282e+38")
hand_made("nodata_float32_longer.tif", put(pixels("float32"), np.s_[0, :30], np.float32(0.1)), "0.1")
for _type in ("int64", "uint64"):
    _large = put(pixels(_type), np.s_[0, :3], np.array([[2**62 + 1], [2**62], [2**62 + 2]]))
    hand_made(f"nodata_{_type}_large.tif", _large, str(2**62 + 1))


def _neighbours(value, dtype):
    """Numbers zero to fifteen steps of the last place away, to both sides."""
    value = np.array(value, dtype)
    up, down = [value], [value]
    for _ in range(15):
        up.append(np.nextafter(up[-1], dtype("inf")))
        down.append(np.nextafter(down[-1], dtype("-inf")))
    return np.array([up, down])


for _name, _value in (("minus_9999", -9999.0), ("1e20", 1e20), ("0", 0.0), ("tiny", 1e-30)):
    _near = put(pixels("float32"), np.s_[0, 5:7, 10:26], _neighbours(_value, np.float32))
    kind(f"nodata_neighbours_{_name}.tif", _near, nodata=float(np.float32(_value)))
kind(
    "nodata_neighbours_float64.tif",
    put(pixels("float64"), np.s_[0, 5, 10:18], -9999 + 10.0 ** np.arange(-9, -1)),
    nodata=-9999,
)

# Scale, offset, descriptions, overviews

kind("scale.tif", scale=((0.0001, 0.5), (-0.1, 3)))
kind("scale_nan.tif", scale=((float("nan"), 1), (0, 0)))
kind("scale_infinite.tif", scale=((float("inf"), 1), (0, 0)))
kind("scale_1e300.tif", scale=((1e300, 1), (0, 0)))
kind("scale_overflow_in_part.tif", put(pixels("float32"), np.s_[0, 0, 0], 3e38), scale=((2, 1), (0, 0)))
kind("scale_zero.tif", scale=((0, 1), (0, 0)))
kind("offset_nan.tif", scale=((1, 1), (float("nan"), 0)))
kind("offset_infinite.tif", scale=((1, 1), (0, float("inf"))))
kind("descriptions.tif", descriptions=("red", "near infrared"))
kind("descriptions_not_ascii.tif", descriptions=("rot, grün", "赤外"))
kind("descriptions_equal.tif", descriptions=("same", "same"))
kind("description_missing.tif", descriptions=("one", None))


@register("overviews.tif")
def _overviews(path):
    write(path, pixels(), **TILED)
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2, 4])


@register("overviews_sidecar.tif")
def _overviews_sidecar(path):
    write(path, pixels())
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as target:
        target.build_overviews([2])


@register("pages.tif")
def _pages(path):
    path.write_bytes(tiff((pixels("uint8", 2), {}), (pixels("uint8", 2, 40, 40) + 1, {})))


# Other formats

KINDS["cog.tif"] = copy_as("COG", pixels(bands=3), {"blocksize": 32})
KINDS["cog_nodata.tif"] = copy_as("COG", put(pixels(), np.s_[0, :30], 0), {"blocksize": 32}, nodata=0)
KINDS["cog_mask.tif"] = copy_as("COG", pixels("uint8", 3), {"blocksize": 32, "compress": "jpeg"}, mask=MASK)
KINDS["lossless.jp2"] = copy_as("JP2OpenJPEG", pixels("uint16", 3), {"quality": "100", "reversible": "yes"})
KINDS["lossless_alpha.jp2"] = copy_as(
    "JP2OpenJPEG", put(pixels("uint8", 4), np.s_[3, :30], 0), {"quality": "100", "reversible": "yes"}
)
KINDS["grey.png"] = copy_as("PNG", pixels("uint8", 1))
KINDS["rgb.png"] = copy_as("PNG", pixels("uint8", 3))
KINDS["rgba.png"] = copy_as("PNG", put(pixels("uint8", 4), np.s_[3, :30], 0))
KINDS["grey_alpha.png"] = copy_as("PNG", put(pixels("uint8", 2), np.s_[1, :30], 0), photometric="minisblack", alpha="yes")
KINDS["nodata.png"] = copy_as("PNG", put(pixels("uint8", 1), np.s_[0, :30], 9), nodata=9)
KINDS["uint16.png"] = copy_as("PNG", pixels("uint16", 1))
KINDS["picture.jpg"] = copy_as("JPEG", pixels("uint8", 3))
KINDS["picture.gif"] = copy_as("GIF", pixels("uint8", 1))
KINDS["picture.bmp"] = copy_as("BMP", pixels("uint8", 3))
KINDS["picture.webp"] = copy_as("WEBP", pixels("uint8", 3), {"lossless": "yes"})
KINDS["imagine.img"] = copy_as("HFA", put(pixels(), np.s_[0, :30], 0), nodata=0)
KINDS["imagine_compressed.img"] = copy_as("HFA", pixels(), {"compressed": "yes"})
KINDS["envi"] = copy_as("ENVI", pixels())
KINDS["envi_floats.dat"] = copy_as("ENVI", pixels("float32"))
KINDS["pci.pix"] = copy_as("PCIDSK", pixels())
KINDS["grid.asc"] = copy_as("AAIGrid", pixels("int32", 1))
KINDS["tif_without_ending"] = lambda path: write(path, pixels())
KINDS["png_named.tif"] = copy_as("PNG", pixels("uint8", 3))
KINDS["tif_named.img"] = lambda path: write(path, pixels())
KINDS["tif_named.png"] = lambda path: write(path, pixels("uint8", 3))


@register("one_variable.nc", "several_variables.nc")
def _netcdf(path):
    with netcdf_file(path, "w") as file:
        file.createDimension("y", HEIGHT)
        file.createDimension("x", WIDTH)
        for name in ("a",) if path.name.startswith("one") else ("a", "b"):
            variable = file.createVariable(name, "f4", ("y", "x"))
            variable[:] = pixels("float32", 1)[0]
            variable._FillValue = np.float32(7)


BAND = """<VRTRasterBand dataType="{dtype}" band="{band}">{more}<SimpleSource>
<SourceFilename relativeToVRT="{relative}">{source}</SourceFilename><SourceBand>{source_band}</SourceBand>
</SimpleSource></VRTRasterBand>"""


def _vrt(path, bands, more=""):
    """Bands as (dtype, source path, band there, further XML); relative sources lie beside the VRT."""
    texts = [
        BAND.format(dtype=dtype, band=at, more=xml, relative=int(not os.path.isabs(source)), source=source, source_band=band)
        for at, (dtype, source, band, xml) in enumerate(bands, start=1)
    ]
    path.write_text(f'<VRTDataset rasterXSize="{WIDTH}" rasterYSize="{HEIGHT}">{"".join(texts)}{more}</VRTDataset>')


@register("absolute.vrt")
def _absolute_vrt(path):
    _vrt(path, [("Int16", str(path.parent / "strips.tif"), band, "") for band in (1, 2)])


@register("relative.vrt")
def _relative_vrt(path):
    _vrt(path, [("Int16", "strips.tif", band, "") for band in (2, 1)])


@register("separate.vrt")
def _separate_vrt(path):
    _vrt(path, [("Int16", "strips.tif", 1, ""), ("Int16", "tiles.tif", 2, "<NoDataValue>7</NoDataValue>")])


@register("nodata_differs.vrt")
def _nodata_vrt(path):
    _vrt(path, [("Int16", "strips.tif", band, f"<NoDataValue>{6 + band}</NoDataValue>") for band in (1, 2)])


@register("types_differ.vrt")
def _types_vrt(path):
    _vrt(path, [("Int16", "strips.tif", 1, ""), ("Float32", "float32.tif", 1, "")])


@register("mask.vrt")
def _mask_vrt(path):
    mask = BAND.format(dtype="Byte", band=1, more="", relative=1, source="mask_internal.tif", source_band="mask,1")
    mask = mask.replace(' band="1"', "")
    _vrt(path, [("Int16", "mask_internal.tif", band, "") for band in (1, 2)], f"<MaskBand>{mask}</MaskBand>")


@register("scaled.vrt")
def _scaled_vrt(path):
    _vrt(path, [("Int16", "strips.tif", 1, "<Offset>5</Offset><Scale>0.25</Scale>")])


@register("missing_source.vrt")
def _missing_vrt(path):
    _vrt(path, [("Int16", "not there.tif", 1, "")])


@register("damaged_source.vrt")
def _damaged_vrt(path):
    _vrt(path, [("Int16", "truncated_50.tif", 1, "")])


@register("names_itself.vrt")
def _cyclic_vrt(path):
    _vrt(path, [("Int16", path.name, 1, "")])


@register("no_bands.vrt")
def _empty_vrt(path):
    _vrt(path, [])


# Damage

KINDS["empty.tif"] = lambda path: path.write_bytes(b"")
KINDS["empty.jp2"] = lambda path: path.write_bytes(b"")
KINDS["text.tif"] = lambda path: path.write_text("no picture at all\n" * 50)
KINDS["only_header.tif"] = lambda path: path.write_bytes(b"II*\0\x08\0\0\0")
KINDS["page.html.tif"] = lambda path: path.write_text("<html><body>404 Not Found</body></html>")


def _truncated(share, dtype="int16", **options):
    def make(path):
        write(path, pixels(dtype), **options)
        truncate(path, share)

    return make


for _share in (0.02, 0.2, 0.5, 0.9, 0.99):
    KINDS[f"truncated_{round(100 * _share):02d}.tif"] = _truncated(_share, compress="deflate", **TILED)
KINDS["truncated_jpeg.tif"] = _truncated(0.7, "uint8", compress="jpeg", **TILED)
KINDS["truncated_jpeg_strips.tif"] = _truncated(0.7, "uint8", compress="jpeg")
KINDS["truncated_lzw.tif"] = _truncated(0.7, compress="lzw")
KINDS["truncated_uncompressed.tif"] = _truncated(0.6)
KINDS["truncated_bands.tif"] = _truncated(0.4, interleave="band", **TILED)


def _flipped(seed, first, last):
    """Flip eight bytes between two shares of the file."""

    def make(path):
        write(path, pixels(), compress="deflate", **TILED)
        data = bytearray(path.read_bytes())
        places = np.random.default_rng(seed).integers(int(first * len(data)), int(last * len(data)), 8)
        for place in places.tolist():
            data[place] ^= 0xFF
        path.write_bytes(data)

    return make


for _seed in range(3):  # seed 3 damages a block that GDAL reads differently from one time to the next
    KINDS[f"flipped_header_{_seed}.tif"] = _flipped(_seed, 0.0, 0.03)
    KINDS[f"flipped_pixels_{_seed}.tif"] = _flipped(_seed, 0.2, 1.0)


@register("truncated.png", "truncated.jp2", "truncated.jpg")
def _truncated_copy(path):
    driver = {".png": "PNG", ".jp2": "JP2OpenJPEG", ".jpg": "JPEG"}[path.suffix]
    copy_as(driver, pixels("uint8", 3))(path)
    truncate(path, 0.5)


@register("header_claims_60000.tif", "header_claims_60000_tiled.tif", "header_claims_one_row_more.tif")
def _lying_header(path):
    size = {"width": WIDTH, "height": HEIGHT + 1} if "more" in path.name else {"width": 60000, "height": 60000}
    write(path, pixels("uint8"), **(TILED if "tiled" in path.name else {}))
    path.write_bytes(set_tags(path.read_bytes(), **size))


# Names, and what is no raster

for _name in (
    "with space.tif",
    "ünïcode 😀.tif",
    "[1].tif",
    "star*.tif",
    "a?b=c&d#e.tif",
    "percent%20.tif",
    "quote'\".tif",
    "back\\slash.tif",
    "new\nline.tif",
    "line\u2028separator.tif",
    "-dash.tif",
    "zip:a.tif",
    "file:b.tif",
    "http:c.tif",
    "GTIFF_DIR:1:d.tif",
    "exclamation!e.tif",
    "$HOME.tif",
    "~.tif",
    "{0}.tif",
    "trailing .tif",
    f"{'long' * 60}.tif",
):
    kind(f"names/{_name}")


@register(os.fsdecode(b"names/caf\xe9.tif"), "names/._x.tif", "names/.hidden.tif")
def _copied(path):
    plain = path.with_name("plain name")
    write(plain, pixels())
    os.replace(plain, path)


@register("archive.zip")
def _zip(path):
    inner = path.with_name("inner.tif.part")
    write(inner, pixels())
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "inner.tif")
    inner.unlink()


@register("archive.tif.gz")
def _gz(path):
    inner = path.with_name("inner.tif.part")
    write(inner, pixels())
    path.write_bytes(gzip.compress(inner.read_bytes()))
    inner.unlink()


KINDS["readme.md"] = lambda path: path.write_text("# Data\n")
KINDS["table.csv"] = lambda path: path.write_text("a,b\n1,2\n")
KINDS["shapes.geojson"] = lambda path: path.write_text('{"type": "FeatureCollection", "features": []}')
KINDS["weights.pt"] = lambda path: path.write_bytes(b"PK\3\4 no archive")
