"""Seeded land scenes in the style of Harmonized Landsat Sentinel-2, so that the demo trains without any download.

A scene grows from its terrain: a valley is cut along a winding river, and height and slope then decide where lakes,
fields, forest, bare ridges and a town lie. Every class mixes two spectra, which gives the variation within a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio  # type: ignore[import-untyped,unused-ignore]
from numpy.typing import NDArray
from scipy import ndimage, spatial  # type: ignore[import-untyped,unused-ignore]

from terratorch_simpler.files import atomic_write

Floats = NDArray[np.float64]
Int16s = NDArray[np.int16]

CLASSES: tuple[str, ...] = ("water", "forest", "crop", "grass", "bare", "built")
BANDS: tuple[str, ...] = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
NODATA = -9999
CLOUD_LABEL = -1
WATER, FOREST, CROP, GRASS, BARE, BUILT = range(len(CLASSES))
LAND_COVER = (0, 1, 1, 1, 2, 3)
"""Forest, crop and grass as one class of vegetation, for the argument ``merged``: the classes of the demo."""

PIXEL_M = 30.0
GRID_COLUMNS = 32  # scenes stand side by side in rows of this many, with a gap, so that no two overlap
GRID_GAP_PX = 16
GRID_ORIGIN_M = (300_000.0, 5_900_040.0)
SUN = np.array([-0.8, 0.6])  # towards the sun at a mid-morning overpass (south-east), as (up, right) in the image

# Reflectance x 10000 of the two spectra that each class mixes: (class, spectrum, band).
SPECTRA = np.array(
    [
        [[300, 310, 190, 100, 60, 40], [480, 680, 500, 230, 110, 70]],  # clear, silty
        [[150, 290, 200, 1600, 800, 360], [220, 450, 310, 2600, 1350, 620]],  # conifer, broadleaf
        [[260, 600, 350, 3400, 1650, 760], [700, 1040, 1380, 1950, 2850, 2300]],  # full cover, ploughed
        [[320, 630, 500, 2450, 1850, 950], [560, 900, 1070, 1950, 2650, 1750]],  # fresh, dry
        [[800, 1080, 1320, 1700, 2350, 2050], [950, 1450, 1950, 2500, 3700, 3200]],  # rock, sand
        [[1100, 1320, 1450, 1900, 2100, 1950], [440, 650, 640, 1750, 1450, 950]],  # roofs and roads, gardens
    ],
    dtype=np.float64,
)
CLOUD_SPECTRUM = np.array([4300, 4500, 4700, 5200, 4000, 3000], dtype=np.float64)
HAZE = np.array([110, 70, 45, 20, 5, 0], dtype=np.float64)


def _standard(values: Floats) -> Floats:
    standard: Floats = (values - values.mean()) / values.std()
    return standard


def _noise(rng: np.random.Generator, size: int, *sigmas: float, gain: float = 1.0) -> Floats:
    """Sum octaves of smoothed white noise (sigmas in pixels, each weighing sigma**gain); mean 0, deviation 1."""
    total = np.zeros((size, size))
    for sigma in sigmas:
        octave: Floats = ndimage.gaussian_filter(rng.standard_normal((size, size)), sigma, truncate=3.0)
        total += octave / octave.std() * sigma**gain
    return _standard(total)


def _rotated(size: int, angle: float | Floats) -> tuple[Floats, Floats]:
    """Pixel coordinates about the centre, turned by an angle in radians (one, or one per pixel)."""
    rows, columns = np.mgrid[:size, :size] - size / 2.0
    return columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)


def _course(rng: np.random.Generator, size: int, angle: float, sway: float, through: tuple[int, int]) -> Floats:
    """Distance in pixels of every pixel to a winding line that runs at an angle through a (row, column)."""
    along, across = _rotated(size, angle)
    steps = np.arange(-size, size)
    line = np.zeros(steps.size)
    for share, sigma in ((1.0, size / 8), (0.35, size / 24)):
        bend: Floats = ndimage.gaussian_filter1d(rng.standard_normal(steps.size), sigma)
        line += share * sway * bend / bend.std()
    line += across[through] - np.interp(along[through], steps, line)
    steep = np.interp(along, steps, np.gradient(line))
    distance: Floats = np.abs(across - np.interp(along, steps, line)) / np.hypot(1.0, steep)
    return distance


def _fields(rng: np.random.Generator, size: int) -> NDArray[np.intp]:
    """Number the fields: Voronoi blocks of land, each cut into strips of its own direction and width."""
    count = max(4, (size // 26) ** 2)
    seeds = rng.uniform(-0.1, 1.1, (count, 2)) * size
    bend = _noise(rng, size, size / 12) * 1.5  # block borders follow tracks, which are not ruler-straight
    _, block = spatial.KDTree(seeds).query((np.mgrid[:size, :size] + bend).transpose(1, 2, 0))
    angle = rng.uniform(0, np.pi) + rng.normal(0, 0.5, count)
    along, across = _rotated(size, angle[block])
    strip = np.floor(across / rng.uniform(4, 10, count)[block]).astype(np.intp)
    shift = 5.0 * (strip % 3)  # staggers the cross cuts of neighbouring strips
    cut = np.floor((along + shift) / rng.uniform(8, 24, count)[block]).astype(np.intp)
    _, numbers = np.unique((block * 2000 + strip + 1000) * 2000 + cut + 1000, return_inverse=True)
    return numbers.reshape(size, size)


def _terrain(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    """Height (about 0 at the river to 2 on ridges) and the distance to the river in pixels, both (size, size)."""
    middle = rng.integers(size // 4, size - size // 4, 2)
    river = _course(rng, size, rng.uniform(0, np.pi), size / 14, (int(middle[0]), int(middle[1])))
    valley = 1.0 - np.exp(-((river / (size * rng.uniform(0.15, 0.35))) ** 2))
    hills = _noise(rng, size, size / 6, size / 14, size / 30, size / 64)
    ridges = 1.0 - np.abs(_noise(rng, size, size / 7, size / 18, size / 40, gain=0.8))
    height: Floats = (0.08 + valley) * np.clip(0.7 + 0.3 * hills + 0.6 * ridges, 0.05, None)
    return height, river


def _town(rng: np.random.Generator, size: int, height: Floats, dry: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Built-up density (above 0 is town) and distance in pixels to the nearest road, both (size, size)."""
    edge = size // 8
    site = np.where(dry, _noise(rng, size, size / 10) - 1.5 * height, -np.inf)[edge:-edge, edge:-edge]
    row, column = (int(i) + edge for i in np.unravel_index(np.argmax(site), site.shape))
    rows, columns = np.mgrid[:size, :size]
    radius = size * rng.uniform(0.1, 0.2)
    density = 1.0 - np.hypot(rows - row, columns - column) / radius + 0.4 * _noise(rng, size, size / 20, size / 50)
    angle = rng.uniform(0, np.pi)
    roads = [_course(rng, size, angle + turn, size / 40, (row, column)) for turn in (0.0, rng.uniform(0.8, 2.2))]
    return density, np.minimum(*roads)


def _streets(rng: np.random.Generator, size: int, density: Floats) -> Floats:
    """Share of gardens among roofs and streets, 0..1: a turned street grid with blocks that differ."""
    u, v = _rotated(size, rng.uniform(0, np.pi))
    pitch = rng.uniform(4.0, 6.0)
    street = (u % pitch < 1.1) | (v % (pitch * 1.4) < 1.1)
    blocks = rng.uniform(-0.35, 0.35, (64, 64))
    block = blocks[np.floor(u / pitch).astype(int) % 64, np.floor(v / pitch / 1.4).astype(int) % 64]
    garden = 0.8 - 0.7 * density + block + 0.2 * rng.standard_normal((size, size))
    share: Floats = np.clip(np.where(street, 0.35 * garden, garden), 0.0, 1.0)
    return share


def _cover(
    rng: np.random.Generator, height: Floats, river: Floats, fields: NDArray[np.intp], woods: Floats
) -> tuple[Int16s, Floats]:
    """Place the classes on the terrain: their numbers and the built-up density, both (size, size)."""
    size = len(height)
    index = np.arange(fields.max() + 1)
    slope = _standard(np.hypot(*np.gradient(ndimage.gaussian_filter(height, 1.5))))
    high = _standard(height)
    patches, scree = _noise(rng, size, size / 10, size / 24), _noise(rng, size, size / 30, size / 70)
    low = ndimage.gaussian_filter(height, 2.0) + 0.05 * patches
    water = (river < rng.uniform(0.7, 2.6)) | (low < np.quantile(low, rng.uniform(0.0, 0.09)))
    arable = ndimage.mean(0.7 * patches - 0.6 * slope - 0.6 * high, fields, index)[fields]  # whole fields only
    wooded = 0.8 * woods + 0.5 * slope + 0.25 * high
    wooded = 0.6 * wooded + 0.4 * ndimage.mean(wooded, fields, index)[fields]  # woods partly end at a field's edge
    density, road = _town(rng, size, height, ~water)

    classes = np.full((size, size), GRASS, dtype=np.int16)
    classes[arable > rng.uniform(-0.4, 0.4)] = CROP
    classes[wooded > rng.uniform(0.1, 0.6)] = FOREST
    classes[high + 0.3 * slope + 0.4 * scree > rng.uniform(1.2, 1.6)] = BARE
    classes[(density > 0) | (road < 0.6)] = BUILT
    classes[water & (road >= 0.6)] = WATER  # roads cross the river on bridges
    return classes, density


def _reflectance(
    rng: np.random.Generator, classes: Int16s, fields: NDArray[np.intp], woods: Floats, density: Floats
) -> Floats:
    """Reflectance x 10000 of evenly lit ground (size, size, 6): the two spectra of each class in a local mix."""
    size, count = len(classes), fields.max() + 1
    season = rng.uniform(0.1, 0.9)  # 0 is fresh spring, 1 a dry late summer
    crop = np.clip(0.8 * rng.beta(0.6, 0.6, count)[fields] + 0.4 * (season - 0.3), 0, 1)
    smooth = 0.22 * _noise(rng, size, size / 16, size / 40)
    streets = np.where(density > 0, _streets(rng, size, density), 0.1)
    mixes = [rng.uniform(0, 0.8) + 0.3 * smooth, 0.5 + 0.3 * woods, crop, season + smooth, 0.5 + smooth, streets]
    mix = np.clip(np.choose(classes, mixes), 0, 1)[..., None]
    parcels = np.where((classes == CROP) | (classes == GRASS), rng.normal(1.0, 0.08, count)[fields], 1.0)
    grain = np.choose(classes, [0.02, 0.10, 0.03, 0.05, 0.08, 0.10]) * _noise(rng, size, 0.6, 1.5, gain=0.5)
    spectra = (1.0 - mix) * SPECTRA[classes, 0] + mix * SPECTRA[classes, 1]
    ground: Floats = spectra * ((1.0 + grain) * parcels)[..., None]
    return ground


def _sunlight(rng: np.random.Generator, height: Floats) -> Floats:
    """Illumination of the slopes relative to flat ground."""
    dy, dx = np.gradient(ndimage.gaussian_filter(height, 0.8))
    steep = rng.uniform(0.15, 0.6) / np.quantile(np.hypot(dy, dx), 0.95)
    cotangent = 1.0 / np.tan(np.radians(rng.uniform(35, 62)))
    facing = -SUN[1] * dx + SUN[0] * dy  # image rows run south
    light: Floats = (1.0 + cotangent * steep * facing) / np.hypot(1.0, steep * np.hypot(dy, dx))
    return np.clip(light, 0.35, 1.5)


def _add_cloud(rng: np.random.Generator, ground: Floats, mask: Int16s) -> Floats:
    """Lay a cloud and its shadow over the ground (size, size, 6), and mark the cloud in the mask in place."""
    size = len(mask)
    row, column = rng.uniform(0.1, 0.9, 2) * size
    rows, columns = np.mgrid[:size, :size]
    puffs = _noise(rng, size, size / 12, size / 24, size / 48, size / 90, gain=0.7)
    reach = size * rng.uniform(0.18, 0.34)
    opacity = np.clip(1.1 * (0.5 - np.hypot(rows - row, columns - column) / reach + 0.7 * puffs), 0.0, 1.0)
    away = size * rng.uniform(0.08, 0.2) * np.array([SUN[0], -SUN[1]])
    shadow = ndimage.gaussian_filter(ndimage.shift(opacity, away, order=1), 1.0)[..., None]
    mask[opacity > 0.1] = CLOUD_LABEL
    opacity = opacity[..., None]
    shaded = ground * (1.0 - 0.65 * shadow)
    clouded: Floats = shaded + (CLOUD_SPECTRUM * (0.8 + 0.3 * opacity) - shaded) * opacity
    return clouded


def _outside_swath(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """The corner wedge that the sensor's swath leaves empty."""
    rows, columns = np.mgrid[:size, :size]
    a, b = rng.uniform(0.3, 0.75, 2) * size
    wedge: NDArray[np.bool_] = rows / a + columns / b < 1.0
    return np.rot90(wedge, int(rng.integers(4)))


def draw_scene(seed: int | Sequence[int], size: int = 128) -> tuple[Int16s, Int16s]:
    """Draw one scene; the same seed and size give the same pixels.

    Args:
        seed: Seed of the scene, whatever numpy.random.default_rng takes.
        size: Height and width in pixels of 30 m; at least 32.

    Returns:
        The image (6, size, size), bands as in BANDS, surface reflectance x 10000 in 0..10000 or NODATA, and the mask
        (size, size), positions in CLASSES or CLOUD_LABEL where cloud or missing data hide the ground.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    rng = np.random.default_rng(seed)
    height, river = _terrain(rng, size)
    fields = _fields(rng, size)
    woods = _noise(rng, size, size / 12, size / 30, size / 64)
    mask, density = _cover(rng, height, river, fields, woods)
    light = np.where(mask == WATER, 1.0, _sunlight(rng, height))
    ground = _reflectance(rng, mask, fields, woods, density) * light[..., None]
    ground = ndimage.gaussian_filter(ground, (0.55, 0.55, 0))  # the sensor's point spread softens borders
    ground = ground * rng.normal(1.0, 0.12) * rng.normal(1.0, 0.03, 6) + HAZE * rng.uniform(0.0, 1.6)
    if rng.random() < 1 / 3:
        ground = _add_cloud(rng, ground, mask)
    ground = ground * rng.normal(1.0, 0.012, ground.shape) + rng.normal(0.0, 12.0, ground.shape)
    image = np.clip(np.rint(ground), 0, 10000).astype(np.int16).transpose(2, 0, 1).copy()
    if rng.random() < 1 / 6:
        outside = _outside_swath(rng, size)
        image[:, outside], mask[outside] = NODATA, CLOUD_LABEL
    return image, mask


def _write_tif(path: Path, bands: Int16s, number: int, names: Sequence[str], nodata: int | None) -> None:
    """Write bands (count, size, size) as a GeoTIFF at the place of scene `number`."""
    count, size, _ = bands.shape
    row, column = divmod(number, GRID_COLUMNS)
    step = (size + GRID_GAP_PX) * PIXEL_M
    west, north = GRID_ORIGIN_M[0] + column * step, GRID_ORIGIN_M[1] - row * step
    transform = rasterio.Affine(PIXEL_M, 0.0, west, 0.0, -PIXEL_M, north)
    with (
        atomic_write(path) as part,
        rasterio.open(
            part, "w", driver="GTiff", width=size, height=size, count=count, dtype="int16",
            crs="EPSG:32632", transform=transform, nodata=nodata, compress="deflate", predictor=2,
        ) as target,
    ):  # fmt: skip
        target.write(bands)
        target.descriptions = tuple(names)


def write_scenes(
    folder: Path, splits: Mapping[str, int], size: int = 128, seed: int = 0, merged: Sequence[int] | None = None
) -> None:
    """Write images/, masks/ and splits/ below a folder; files appear under their name only when complete.

    Scenes are numbered through all splits in the order given; a scene depends on `seed` and its number alone.

    Args:
        folder: Where to write; made where missing.
        splits: Name and number of scenes of every split, such as {"train": 160, "val": 32}.
        size: Height and width of a scene in pixels of 30 m; at least 32.
        seed: Seed of the whole set.
        merged: What every class of CLASSES is in the masks, such as LAND_COVER; by default itself.
    """
    numbers = np.array([*(range(len(CLASSES)) if merged is None else merged), CLOUD_LABEL], dtype=np.int16)
    number = 0
    for split, count in splits.items():
        ids = [f"scene_{i:04d}" for i in range(number, number + count)]
        for scene in ids:
            image, mask = draw_scene((seed, number), size)
            _write_tif(folder / "images" / f"{scene}_image.tif", image, number, BANDS, NODATA)
            _write_tif(folder / "masks" / f"{scene}_mask.tif", numbers[mask][None], number, ("class",), None)
            number += 1
        with atomic_write(folder / "splits" / f"{split}.txt") as part:
            part.write_text("".join(f"{scene}\n" for scene in ids), encoding="utf-8")
