"""Which pixels hold data, as GDAL says it, and that whatever reaches an encoder is finite."""

import numpy as np
import pytest
import rasterio
import torch

from terratorch_simpler import SlimmingPlan
from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.errors import TilesError
from tests.cli_runner import Command, config
from tests.rasters import draw, one_by_one, write

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # of writing


def only(path, **kwargs):
    """Image and mask of the one window."""
    ((_, _, _, image, valid),) = one_by_one(
        GeoTiffTiles(str(path), **{"tile_size": 16, "max_nodata_fraction": 1.0, **kwargs})
    )
    assert torch.isfinite(image).all()
    return image, valid.numpy()


# Masks


def write_masks(path, masks):
    """A mask a band beside the file, as GDAL's .msk files hold them; rasterio writes one for all bands only."""
    count, height, width = masks.shape
    with rasterio.open(f"{path}.msk", "w", driver="GTiff", width=width, height=height, count=count, dtype="uint8") as target:
        target.write(masks)
        target.update_tags(**{f"INTERNAL_MASK_FLAGS_{band}": "0" for band in range(1, count + 1)})


@pytest.mark.parametrize("bands", [None, [1], [2], [3, 2], [1, 3]])
@pytest.mark.parametrize("nodata", [None, 7.0])
def test_masks_of_single_bands(tmp_path, bands, nodata):
    """A pixel is valid where every band that is read is."""
    pixels = np.maximum(draw(3, 16, 16), 8)
    pixels[2, 15, 15] = 7
    masks = np.full((3, 16, 16), 255, np.uint8)
    masks[1, :5] = masks[2, 5:7, :3] = 0
    path = write(tmp_path / "a.tif", pixels)
    write_masks(path, masks)
    with rasterio.open(path) as source:
        assert source.mask_flag_enums == ([], [], [])
        expected = np.all([source.read_masks(band) > 0 for band in bands or (1, 2, 3)], axis=0)
    if nodata is not None and (bands is None or 3 in bands):
        expected[15, 15] = False
    image, valid = only(path, bands=bands, nodata=nodata)
    assert np.array_equal(valid, expected)
    assert np.array_equal(image[:, expected], pixels[[band - 1 for band in bands or (1, 2, 3)]][:, expected])


@pytest.mark.parametrize("listing", ["EMPTY_DIR", "TRUE", "FALSE"])
def test_masks_beside_files_are_read_whatever_is_set(tmp_path, monkeypatch, listing):
    """``terratorch fit`` sets the first."""
    masks = np.full((1, 16, 16), 255, np.uint8)
    masks[0, :5] = 0
    path = write(tmp_path / "a.tif", draw(1, 16, 16))
    write_masks(path, masks)
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", listing)
    assert np.array_equal(only(path)[1], masks[0] > 0)


def test_masks_beside_files_are_read_by_terratorch_fit(scenes, tmp_path):
    folder = tmp_path / "tiles"
    for number in range(40):
        path = write(folder / f"{number}.tif", draw(6, 64, 64, seed=number))
        if number < 4:
            write_masks(path, np.zeros((6, 64, 64), np.uint8))
    tiles = {"class_path": "terratorch_simpler.GeoTiffTiles", "init_args": {"paths": str(folder), "tile_size": 64}}
    command = Command(tmp_path, config(scenes, tmp_path, tiles=tiles), "--trainer.max_epochs", "0")
    assert command.wait() == [0], command.output()
    plan = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")
    assert plan.tiles_seen == 36
    assert plan.data["skipped"] == {"nodata": 4, "no raster": 4}


def test_alpha_that_is_not_read_is_the_mask(tmp_path):
    pixels = draw(4, 16, 16, dtype="uint8")
    pixels[3, :4], pixels[3, 4:8] = 0, 1  # transparent, hardly opaque
    path = write(tmp_path / "a.tif", pixels, photometric="RGB", alpha="YES")
    assert only(path)[1].all()
    assert only(path, bands=[4, 1])[1].all()
    _, valid = only(path, bands=[1, 2, 3])
    assert np.array_equal(valid, pixels[3] > 0)


# Values that mean no data


@pytest.mark.parametrize("value", [-9999.0, 1.1, 0.0, 1e-40, -3.4028234663852886e38, 65535.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of nextafter here
def test_nodata_of_floats_is_compared_as_gdal_does(tmp_path, value, dtype, declared):
    around = np.full((1, 16, 16), value, dtype).reshape(-1)
    for step in range(1, 20):  # neighbours, nearer ones first
        around[step] = np.nextafter(around[step - 1], np.array(0, dtype))
        around[step + 100] = np.nextafter(
            around[step + 99 if step > 1 else 0], np.array(np.inf * np.sign(value or 1), dtype)
        )
    around[200:] = 3
    around[220:230] = value * (1 + np.linspace(-1e-6, 1e-6, 10))
    pixels = np.nan_to_num(around, posinf=3, neginf=3).reshape(1, 16, 16)
    path = write(tmp_path / "a.tif", pixels, nodata=value)
    with rasterio.open(path) as source:
        expected = source.read_masks(1) > 0
    if not declared:
        path = write(tmp_path / "b.tif", pixels)
    _, valid = only(path, nodata=None if declared else value)
    assert np.array_equal(valid, expected & (np.abs(pixels[0]) <= np.finfo(np.float32).max))
    assert valid.sum() > 16


@pytest.mark.parametrize("nodata", [0.5, 255, 256, -1])
def test_nodata_of_whole_numbers(tmp_path, nodata):
    pixels = draw(1, 16, 16, dtype="uint8")
    pixels[0, 0], pixels[0, 1] = 0, 255
    path = write(tmp_path / "a.tif", pixels)
    path.with_suffix(".tif.aux.xml").write_text(
        f'<PAMDataset><PAMRasterBand band="1"><NoDataValue>{nodata}</NoDataValue></PAMRasterBand></PAMDataset>'
    )
    with rasterio.open(path) as source:
        expected = source.read_masks(1) > 0
        assert expected.all() == (nodata in (256, -1))
    assert np.array_equal(only(path)[1], expected)


# What fills gaps, and scales


def test_what_fills_gaps_is_finite(tmp_path):
    pixels = draw(1, 16, 16, dtype="float32")
    pixels[0, :2] = -3.4028235e38  # nodata that nobody declared
    pixels[0, 5, 5] = np.nan
    image, valid = only(write(tmp_path / "a.tif", pixels))
    assert np.argwhere(~valid).tolist() == [[5, 5]]
    assert image[0, 5, 5] == pytest.approx(np.nanmean(pixels.astype(np.float64)))
    assert np.array_equal(image[0][torch.from_numpy(valid)], pixels[0][valid])


@pytest.mark.parametrize("scales", [(np.nan, 0.0), (np.inf, 0.0), (1e300, 0.0), (1e38, 0.0), (1.0, np.nan), (1.0, -1e300)])
@pytest.mark.parametrize("workers", [0, 2])
def test_windows_that_a_scale_makes_infinite_are_counted(tmp_path, scales, workers):
    for number in range(9):
        write(tmp_path / f"{number}.tif", draw(2, 16, 16) + 10, scale=((0.5, 2.0), (1.0, 0.0)))
    write(tmp_path / "bad.tif", draw(2, 16, 16) + 10, scale=((1.0, scales[0]), (0.0, scales[1])))
    tiles = GeoTiffTiles(str(tmp_path), tile_size=16, scale="file", offset="file", num_workers=workers)
    assert len(one_by_one(tiles)) == 9
    assert tiles.skipped == {"not finite": 1}
    tiles = GeoTiffTiles(str(tmp_path / "bad.tif"), tile_size=16)
    assert len(one_by_one(tiles)) == 1  # what the file says is not asked for


def test_windows_that_statistics_make_infinite_are_counted(tmp_path):
    pixels = draw(1, 16, 32, dtype="float32")
    pixels[0, 3, 3] = 3e38
    tiles = GeoTiffTiles(
        str(write(tmp_path / "a.tif", pixels)), tile_size=16, means=[0.0], stds=[1e-3], max_bad_fraction=0.5
    )
    assert [tile[2] for tile in one_by_one(tiles)] == [[16, 0, 16, 16]]
    assert tiles.skipped == {"not finite": 1}


@pytest.mark.parametrize(
    "kwargs", [{"scale": 1e39}, {"offset": -1e39}, {"means": [1e39], "stds": [1.0]}, {"means": [1.0], "stds": [1e39]}]
)
def test_numbers_that_float32_does_not_hold_are_refused(tmp_path, kwargs):
    path = write(tmp_path / "a.tif", draw(1, 16, 16))
    with pytest.raises(
        TilesError, match=r"^\w+ is \[?-?1e\+39\]?, expected at most 3\.4e\+38, since pixels are float32: change"
    ):
        GeoTiffTiles(str(path), **kwargs)
    with pytest.raises(TilesError, match=r"^stds are \[1e-46\], expected values above 0: change stds\.$"):
        GeoTiffTiles(str(path), means=[0.0], stds=[1e-46])
