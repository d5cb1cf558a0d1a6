"""Small GeoTIFF files for tests."""

import numpy as np
import rasterio

PLACE = {"crs": "EPSG:32632", "transform": rasterio.Affine(30, 0, 500000, 0, -30, 5000000)}


def draw(*shape, dtype="int16", seed=0):
    return np.random.default_rng(seed).integers(1, 200, shape).astype(dtype)


def write(path, pixels, descriptions=None, mask=None, tags=None, scale=None, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    shape = {"width": width, "height": height, "count": count, "dtype": pixels.dtype}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", **shape, **{**PLACE, **profile}) as target,
    ):
        target.write(pixels)
        if descriptions:
            target.descriptions = descriptions
        if mask is not None:
            target.write_mask(mask)
        if tags:
            target.update_tags(**tags)
        if scale:
            target.scales, target.offsets = scale
    return path


def write_many(folder, count=4, height=40, width=56, bands=2, **profile):
    for number in range(count):
        write(folder / f"{number}.tif", draw(bands, height, width, seed=number), **profile)
    return str(folder)


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def one_by_one(tiles):
    """The stream as (index, path, window, image, valid), whatever the batches."""
    return [
        tile
        for batch in tiles
        for tile in zip(batch["index"], batch["path"], batch["window"].tolist(), batch["image"], batch["valid"], strict=True)
    ]
