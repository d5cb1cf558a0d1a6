"""Windows of GeoTIFF files: which are read, in what order, what they hold, and what happens to damaged or empty ones."""

import contextlib
import itertools
import os
import random
import struct
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.io import MemoryFile
from rasterio.windows import Window

from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.data.rasters import Raster
from terratorch_simpler.errors import TilesError
from tests.rasters import PLACE, draw, one_by_one, truncate, write, write_many

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # of writing

SENTENCE = r"^[A-Z].+, expected .+: .+\.$"


# Paths


@pytest.fixture
def layout(tmp_path):
    """Three rasters at different depths, and files that are none."""
    for name in ("a.tif", "sub/b.TIF", "sub/deep.tif/c.tiff"):
        write(tmp_path / name, draw(1, 8, 8))
    (tmp_path / "sub" / "b.TIF.aux.xml").write_text("<PAMDataset/>")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.tif  \r\n\r\n{tmp_path}/sub\n{tmp_path}/*.tif\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("a.tif", ["a.tif"]),
        ("", ["a.tif", "sub/b.TIF", "sub/deep.tif/c.tiff"]),
        ("sub", ["sub/b.TIF", "sub/deep.tif/c.tiff"]),
        ("*.tif", ["a.tif"]),
        ("sub/*[Ff]", ["sub/b.TIF"]),
        ("**/*.ti*f", ["a.tif", "sub/deep.tif/c.tiff"]),
        ("list.txt", ["a.tif", "sub/b.TIF", "sub/deep.tif/c.tiff"]),
        (["sub/b.TIF", "*.tif"], ["sub/b.TIF", "a.tif"]),
        (["a.tif", "a.tif", ""], ["a.tif", "sub/b.TIF", "sub/deep.tif/c.tiff"]),
    ],
)
def test_paths(layout, paths, expected):
    found = [str(layout / path) for path in paths] if isinstance(paths, list) else str(layout / paths)
    tiles = GeoTiffTiles(found, tile_size=8)
    assert tiles.paths == [str(layout / path) for path in expected]
    assert {tile[1] for tile in one_by_one(tiles)} == set(tiles.paths)


def test_path_objects_and_gdal_paths(layout):
    assert GeoTiffTiles(layout / "a.tif").paths == [str(layout / "a.tif")]
    pixels = draw(1, 8, 8)
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", width=8, height=8, count=1, dtype="int16") as target:
            target.write(pixels)
        ((_, path, _, image, _),) = one_by_one(GeoTiffTiles(memory.name, tile_size=8))
        assert path.startswith("/vsimem/")
        assert np.array_equal(image, pixels)


@pytest.mark.parametrize("paths", ["none.tif", "none/*.tif", "empty", "blank.txt", ["a.tif", "none.tif"], []])
def test_nothing_found_is_an_error_that_names_what_is_missing(layout, paths):
    found = [str(layout / path) for path in paths] if isinstance(paths, list) else str(layout / paths)
    with pytest.raises(TilesError, match=r"No raster file at .*, expected a file, folder, glob") as error:
        GeoTiffTiles(found)
    assert str(layout / "a.tif") not in str(error.value)
    assert str(found[-1] if isinstance(found, list) and found else found) in str(error.value)


# Windows


@pytest.mark.parametrize("stride", [None, 10, 20])
@pytest.mark.parametrize("place", [PLACE, {"crs": None, "transform": None}])
def test_windows_hold_what_the_file_holds(tmp_path, stride, place):
    folder = write_many(tmp_path, count=3, **place)
    tiles = GeoTiffTiles(folder, tile_size=16, stride=stride, batch_size=3)
    found = one_by_one(tiles)
    assert sorted(tile[0] for tile in found) == list(range(len(tiles)))
    for _, path, (column, row, width, height), image, valid in found:
        assert (width, height) == (16, 16)
        with rasterio.open(path) as source:
            expected = source.read(window=Window(column, row, 16, 16))
        assert np.array_equal(image, expected)
        assert valid.all()


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 24), st.integers(3, 24), st.integers(3, 12), st.none() | st.integers(2, 15), st.integers(0, 3))
def test_grid_of_windows(width, height, size, stride, seed):
    step = stride or size
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", width=width, height=height, count=1, dtype="uint8", **PLACE) as target:
            target.write(draw(1, height, width, dtype="uint8"))
        tiles = GeoTiffTiles(memory.name, tile_size=size, stride=stride, num_workers=0, seed=seed)
        expected = {(x, y) for x in range(width) for y in range(height) if x % step == y % step == 0}
        expected = {(x, y) for x, y in expected if x + size <= width and y + size <= height}
        assert len(tiles) == len(expected)
        if not expected:
            with pytest.raises(TilesError, match=SENTENCE):
                next(iter(tiles))
            return
        assert Counter((x, y) for _, _, (x, y, _, _), _, _ in one_by_one(tiles)) == Counter(expected)


def test_order_depends_on_the_seed_only(tmp_path):
    folder = write_many(tmp_path)

    def order(seed=0, **kwargs):
        return [tile[:3] for tile in one_by_one(GeoTiffTiles(folder, tile_size=16, seed=seed, **kwargs))]

    expected = order(num_workers=0)
    assert len(expected) == 24
    assert expected != sorted(expected)
    for workers in (0, 1, 4):
        for batch_size in (1, 3, 16):
            assert order(num_workers=workers, batch_size=batch_size) == expected
    assert order(seed=1) != expected
    assert sorted(order(seed=1)) == sorted(expected)


def test_second_pass_repeats_the_first(tmp_path):
    tiles = GeoTiffTiles(write_many(tmp_path), tile_size=16)
    assert [tile[0] for tile in one_by_one(tiles)] == [tile[0] for tile in one_by_one(tiles)]


def test_batches(tmp_path):
    batches = list(GeoTiffTiles(write_many(tmp_path), tile_size=16, batch_size=10))
    assert [len(batch["index"]) for batch in batches] == [10, 10, 4]
    for batch in batches:
        size = len(batch["index"])
        assert set(batch) == {"image", "valid", "index", "position", "path", "window"}
        assert (batch["image"].shape, batch["image"].dtype) == ((size, 2, 16, 16), torch.float32)
        assert (batch["valid"].shape, batch["valid"].dtype) == ((size, 16, 16), torch.bool)
        assert (batch["window"].shape, batch["window"].dtype) == ((size, 4), torch.int64)
        assert [type(number) for number in batch["index"]] == [int] * size
        assert [type(path) for path in batch["path"]] == [str] * size


def test_batches_that_are_kept_are_not_overwritten(tmp_path):
    folder = write_many(tmp_path, count=12, nodata=5)
    kept = list(GeoTiffTiles(folder, tile_size=8, batch_size=4, max_nodata_fraction=0.01))
    assert len(kept) > 10
    for batch in kept:
        for path, (column, row, _, _), image, valid in zip(
            batch["path"], batch["window"].tolist(), batch["image"], batch["valid"], strict=True
        ):
            with rasterio.open(path) as source:
                expected = source.read(window=Window(column, row, 8, 8))
            assert np.array_equal(image[:, valid], expected[:, valid])


def test_memory_of_batches_nobody_holds_is_used_again(tmp_path):
    addresses = []
    for batch in GeoTiffTiles(write_many(tmp_path), tile_size=8, batch_size=4, num_workers=2):
        addresses.append(batch["image"].data_ptr())
    assert len(addresses) > 30
    assert len(set(addresses)) <= 4 + 2 * 512 // 4


def test_shards_are_disjoint_shares_of_one_sequence(tmp_path):
    folder = write_many(tmp_path)

    def sequence(shard=None, **kwargs):
        tiles = GeoTiffTiles(folder, tile_size=8, **kwargs)
        tiles = tiles.shard(*shard) if shard else tiles
        found = [tile[0] for tile in one_by_one(tiles)]
        assert len(found) == len(tiles)
        return found

    whole = sequence()
    for num_shards in (1, 2, 3, 7):
        shares = [sequence((num_shards, index), batch_size=index + 1, num_workers=index % 3) for index in range(num_shards)]
        assert [share[:] for share in shares] == [whole[index::num_shards] for index in range(num_shards)]
    blocks = [position for position in range(len(whole)) if position // 4 % 2 == 1 and position >= 6]
    assert sequence((2, 1, 4, 6)) == [whole[position] for position in blocks]
    for index in (-1, 2):
        with pytest.raises(TilesError, match=rf"No shard {index} of 2, expected 0 to 1"):
            GeoTiffTiles(folder).shard(2, index)
    for wrong in ((0, 0), ("many", 0), (2, 0.5), (2, 0, 0), (2, 0, 1, -3)):
        with pytest.raises(TilesError, match=r"^\w+ is .*, expected .*: change \w+\.$"):
            GeoTiffTiles(folder).shard(*wrong)


def test_files_that_cannot_be_used_count_in_one_share_only(tmp_path):
    folder = Path(write_many(tmp_path))
    (folder / "broken.tif").write_bytes(b"II*")
    shares = [GeoTiffTiles(str(folder), tile_size=8, max_bad_fraction=1.0).shard(3, index) for index in range(3)]
    for share in shares:
        list(share)
    assert [share.skipped for share in shares] == [{"unreadable": 1}, {}, {}]
    later = GeoTiffTiles(str(folder), tile_size=8, max_bad_fraction=1.0).shard(1, 0, start=5)
    list(later)
    assert not later.skipped  # they were counted before


def test_every_window_is_equally_likely(tmp_path):
    """Chi-square over which windows come first, and over how far apart neighbours are."""
    folder = write_many(tmp_path, count=3, height=32, width=40)  # 3 x 20 windows
    first, steps = Counter(), Counter()
    for seed in range(600):
        batch = next(iter(GeoTiffTiles(folder, tile_size=8, batch_size=6, num_workers=0, seed=seed)))
        first.update(batch["index"])
        steps.update(abs(a - b) for a, b in itertools.pairwise(batch["index"]))
    assert len(first) == 60
    assert scipy.stats.chisquare([first[number] for number in range(60)]).pvalue > 0.001
    pairs = np.array([60 - step for step in range(1, 60)])  # how many pairs are that far apart
    expected = pairs / pairs.sum() * sum(steps.values())
    groups = np.arange(59) // 6
    observed = np.bincount(groups, [steps[step] for step in range(1, 60)])
    assert scipy.stats.chisquare(observed, np.bincount(groups, expected)).pvalue > 0.001


# Bands and values


@pytest.mark.parametrize(
    ("bands", "expected"), [(None, [0, 1, 2]), ([2], [1]), ([3, 1], [2, 0]), (["RED", "BLUE"], [2, 0]), (["RED", 2], [2, 1])]
)
def test_bands_by_number_and_description(tmp_path, bands, expected):
    pixels = draw(3, 8, 8)
    path = write(tmp_path / "a.tif", pixels, descriptions=("BLUE", "GREEN", "RED"))
    ((_, _, _, image, _),) = one_by_one(GeoTiffTiles(str(path), tile_size=8, bands=bands))
    assert np.array_equal(image, pixels[expected])


@pytest.mark.parametrize("band", ["NIR", 0, 4, -1])
@pytest.mark.parametrize("workers", [0, 2])
def test_unknown_band_is_refused(tmp_path, band, workers):
    path = write(tmp_path / "a.tif", draw(3, 8, 8), descriptions=("BLUE", "GREEN", "RED"))
    with pytest.raises(TilesError, match=r"expected 1 to 3 or one of \['BLUE', 'GREEN', 'RED'\]: change bands") as error:
        list(GeoTiffTiles(str(path), tile_size=8, bands=[1, band], num_workers=workers))
    assert f"No band {band!r} in {path}" in str(error.value)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64"])
def test_types_of_pixels(tmp_path, dtype):
    pixels = draw(2, 8, 8, dtype=dtype)
    ((_, _, _, image, _),) = one_by_one(GeoTiffTiles(str(write(tmp_path / "a.tif", pixels)), tile_size=8))
    assert image.dtype == torch.float32
    assert np.array_equal(image, pixels)


def test_scale_and_offset(tmp_path):
    pixels = draw(2, 8, 8)
    path = write(tmp_path / "a.tif", pixels)
    ((_, _, _, image, _),) = one_by_one(GeoTiffTiles(str(path), tile_size=8, scale=1e-4, offset=-0.1))
    assert np.allclose(image, pixels * 1e-4 - 0.1, rtol=0, atol=1e-7)


def test_scale_and_offset_of_the_file_when_asked(tmp_path):
    pixels = draw(3, 8, 8)
    path = write(tmp_path / "a.tif", pixels, scale=((0.1, 0.2, 0.4), (1, 2, 4)))
    ((_, _, _, image, _),) = one_by_one(GeoTiffTiles(str(path), tile_size=8))
    assert np.array_equal(image, pixels)
    tiles = GeoTiffTiles(str(path), tile_size=8, bands=[3, 1], scale="file", offset="file")
    ((_, _, _, image, _),) = one_by_one(tiles)
    assert np.allclose(image, pixels[[2, 0]] * np.reshape([0.4, 0.1], (2, 1, 1)) + np.reshape([4, 1], (2, 1, 1)), atol=1e-4)
    ((_, _, _, image, _),) = one_by_one(GeoTiffTiles(str(path), tile_size=8, scale=2, offset="file"))
    assert np.allclose(image, pixels * 2 + np.reshape([1, 2, 4], (3, 1, 1)))


@pytest.mark.parametrize("frames", [1, 2])
def test_normalised_after_scaling_and_missing_pixels_are_the_mean(tmp_path, frames):
    pixels = draw(4, 8, 8)
    pixels[1, 0, :5] = -9999
    path = write(tmp_path / "a.tif", pixels, nodata=-9999)
    means, stds = np.array([1.0, 2, 3, 4][: 4 // frames]), np.array([2.0, 4, 5, 8][: 4 // frames])
    tiles = GeoTiffTiles(
        str(path), tile_size=8, num_frames=frames, scale=0.1, offset=1, means=means.tolist(), stds=stds.tolist()
    )
    ((_, _, _, image, valid),) = one_by_one(tiles)
    by_frame = (pixels * 0.1 + 1).reshape(frames, -1, 8, 8)
    expected = ((by_frame - means[:, None, None]) / stds[:, None, None]).swapaxes(0, 1)
    expected[1, 0, 0, :5] = 0
    assert np.allclose(image.reshape(expected.shape), expected, rtol=0, atol=1e-5)
    assert (~valid).nonzero().tolist() == [[0, column] for column in range(5)]


def test_missing_pixels_are_the_mean_of_the_tile_where_no_mean_is_known(tmp_path):
    pixels = draw(2, 8, 8)
    pixels[1, 0, :5] = -9999
    ((_, _, _, image, _),) = one_by_one(GeoTiffTiles(str(write(tmp_path / "a.tif", pixels, nodata=-9999)), tile_size=8))
    assert np.array_equal(image[0], pixels[0])
    assert np.allclose(image[1, 0, :5], pixels[1][pixels[1] != -9999].mean())


@pytest.mark.parametrize(
    ("dtype", "hole", "declared", "argument"),
    [
        ("int16", -9999, -9999, None),
        ("int16", 0, None, 0),
        ("int16", 0, -9999, 0),
        ("uint8", 255, 255, None),
        ("float32", np.nan, None, None),
        ("float32", np.nan, np.nan, None),
        ("float32", -3.4028234663852886e38, -3.4028234663852886e38, None),
        ("float64", -1.7976931348623157e308, -1.7976931348623157e308, None),
        ("float32", np.inf, None, None),
    ],
)
def test_nodata(tmp_path, dtype, hole, declared, argument):
    pixels = draw(2, 8, 8, dtype=dtype)
    pixels[0, 2, 3] = pixels[1, 4:6, 5] = hole
    path = write(tmp_path / "a.tif", pixels, nodata=declared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((_, _, _, image, valid),) = one_by_one(GeoTiffTiles(str(path), tile_size=8, nodata=argument, num_workers=0))
    assert (~valid).nonzero().tolist() == [[2, 3], [4, 5], [5, 5]]
    assert np.array_equal(image[:, valid], pixels[:, valid])
    assert torch.isfinite(image).all()


@pytest.mark.parametrize("sidecar", [False, True])
@pytest.mark.parametrize("nodata", [None, 7.0])
def test_mask_band(tmp_path, sidecar, nodata):
    pixels = draw(2, 16, 16)
    pixels[0, 3, 3] = 7
    pixels[:, 1:4, 1:4][pixels[:, 1:4, 1:4] != 7] = 100
    mask = np.full((16, 16), 255, np.uint8)
    mask[:2, 5:9] = 0
    path = write(tmp_path / "a.tif", pixels, mask=None if sidecar else mask)
    if sidecar:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as target:
            target.write_mask(mask)
        assert (tmp_path / "a.tif.msk").exists()
    ((_, _, _, _, valid),) = one_by_one(GeoTiffTiles(str(path), tile_size=16, nodata=nodata))
    expected = mask > 0
    if nodata is not None:
        expected &= (pixels != 7).all(axis=0)
    assert np.array_equal(valid, expected)


def test_fourth_band_that_gdal_calls_alpha_is_data(tmp_path):
    pixels = draw(4, 8, 8, dtype="uint8")
    pixels[3, :4] = 0  # near infrared over water
    path = write(tmp_path / "a.tif", pixels)
    with rasterio.open(path) as source:
        assert source.colorinterp[3].name == "alpha"
    ((_, _, _, image, valid),) = one_by_one(GeoTiffTiles(str(path), tile_size=8))
    assert valid.all()
    assert np.array_equal(image, pixels)


def test_nodata_of_the_file_that_an_argument_replaces_is_data(tmp_path):
    pixels = draw(1, 8, 8)
    pixels[0, 0, 0] = -9999
    path = write(tmp_path / "a.tif", pixels, nodata=-9999)
    ((_, _, _, image, valid),) = one_by_one(GeoTiffTiles(str(path), tile_size=8, nodata=0))
    assert valid.all()
    assert image[0, 0, 0] == -9999


@pytest.mark.parametrize(("limit", "kept"), [(0.0, [0]), (0.29, [0]), (0.3, [0, 30]), (0.5, [0, 30]), (1.0, [0, 30, 99])])
def test_windows_that_mostly_lack_data_are_skipped_and_no_damage(tmp_path, limit, kept):
    for holes in (0, 30, 99, 100):
        pixels = draw(2, 10, 10)
        pixels[1].flat[:holes] = 0
        write(tmp_path / f"{holes}.tif", pixels, nodata=0)
    tiles = GeoTiffTiles(str(tmp_path), tile_size=10, max_nodata_fraction=limit, max_bad_fraction=0)
    assert sorted(int(Path(tile[1]).stem) for tile in one_by_one(tiles)) == kept
    assert tiles.skipped == {"nodata": 4 - len(kept)}


# Time steps


def test_frames_keep_the_bands_of_a_step_together(tmp_path):
    pixels = draw(6, 8, 8)
    path = write(tmp_path / "a.tif", pixels)
    (batch,) = GeoTiffTiles(str(path), tile_size=8, num_frames=2)
    assert batch["image"].shape == (1, 3, 2, 8, 8)
    assert batch["valid"].shape == (1, 8, 8)
    for step in range(2):
        assert np.array_equal(batch["image"][0, :, step], pixels[3 * step : 3 * step + 3])


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"num_frames": 4}, "6 bands for 4 frames, expected a multiple"),
        ({"num_frames": 4, "means": [1.0], "stds": [1.0]}, "6 bands for 4 frames, expected a multiple"),
        ({"means": [1.0] * 3, "stds": [1.0] * 3}, "6 bands and 3 means, expected one mean per band"),
        ({"num_frames": 2, "means": [1.0] * 2, "stds": [1.0] * 2}, "6 bands and 2 means"),
    ],
)
def test_bands_that_do_not_fit_frames_or_means_are_refused(tmp_path, kwargs, expected):
    path = write(tmp_path / "a.tif", draw(6, 8, 8))
    with pytest.raises(TilesError, match=expected) as error:
        list(GeoTiffTiles(str(path), tile_size=8, **kwargs))
    assert str(error.value).endswith(".")


# What cannot be used


def test_small_files_are_counted(tmp_path):
    write_many(tmp_path, count=2)
    for height, width in ((8, 40), (40, 8)):
        write(tmp_path / f"small_{height}.tif", draw(2, height, width))
    tiles = GeoTiffTiles(str(tmp_path), tile_size=16, max_bad_fraction=0)
    assert len(one_by_one(tiles)) == len(tiles) == 12
    assert tiles.skipped == {"smaller than tile_size": 2}
    assert "small_8.tif (smaller than tile_size)" in str(tiles.skips)


def test_only_small_files_are_an_error(tmp_path):
    tiles = GeoTiffTiles(write_many(tmp_path), tile_size=64)
    with pytest.raises(TilesError, match=r"No window of 64 x 64 pixels \(4 smaller than tile_size; first: .*0\.tif"):
        list(tiles)
    with pytest.raises(TilesError, match=SENTENCE):
        list(tiles)


@pytest.mark.parametrize("workers", [0, 3])
def test_damaged_files_are_skipped_counted_and_named(tmp_path, workers):
    folder = write_many(tmp_path, count=20)
    truncate(tmp_path / "3.tif", 0.9)
    (tmp_path / "7.tif").write_text("not a raster")
    (tmp_path / "9.tif").write_bytes(b"")
    tiles = GeoTiffTiles(folder, tile_size=16, num_workers=workers, max_bad_fraction=0.1)
    found = one_by_one(tiles)
    assert len(found) + sum(tiles.skipped.values()) == len(tiles) + 2
    assert set(tiles.skipped) == {"unreadable", "empty file"}
    assert tiles.skipped["unreadable"] >= 2
    assert {Path(tile[1]).name for tile in found} >= {f"{n}.tif" for n in range(20) if n not in (3, 7, 9)}
    for named in ("3.tif (unreadable)", "7.tif (unreadable)", "9.tif (empty file)"):
        assert str(tiles.skips).count(named) == 1
    assert len(one_by_one(tiles)) == len(found)  # counted anew in every pass
    assert tiles.skipped["unreadable"] < 10


def test_file_that_vanishes_is_counted(tmp_path):
    tiles = GeoTiffTiles(write_many(tmp_path, count=20), tile_size=40)
    assert len(tiles) == 20
    (tmp_path / "7.tif").unlink()
    assert len(one_by_one(tiles)) == 19
    assert tiles.skipped == {"vanished": 1}


def test_files_without_permission_are_counted(tmp_path, as_nobody):
    folder = write_many(tmp_path, count=20)
    (tmp_path / "7.tif").chmod(0)
    as_nobody()
    tiles = GeoTiffTiles(folder, tile_size=40)
    assert len(one_by_one(tiles)) == 19
    assert tiles.skipped == {"permission denied": 1}


def test_every_reason_has_its_count(tmp_path):
    """One folder with everything that can be wrong at once."""
    folder = write_many(tmp_path, count=12, bands=2, nodata=0)
    write(tmp_path / "blank.tif", np.zeros((2, 40, 56), np.int16), nodata=0)
    write(tmp_path / "three_bands.tif", draw(3, 40, 56))
    write(tmp_path / "small.tif", draw(2, 40, 39))
    write(tmp_path / "complex.tif", draw(2, 40, 56, dtype="complex64"))
    truncate(write(tmp_path / "cut.tif", draw(2, 40, 56)), 0.6)
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.tif").write_text("no raster")
    write(tmp_path / "rotated.tif", draw(2, 40, 56), transform=rasterio.Affine(20, 5, 500000, 5, -20, 5000000))
    write(tmp_path / "nowhere.tif", draw(2, 40, 56, dtype="float64"), crs=None, transform=None)
    write(tmp_path / "degrees.tif", draw(2, 40, 56, dtype="uint8"), crs="EPSG:4326", transform=rasterio.Affine.scale(1e-4))
    write(tmp_path / "gone.tif", draw(2, 40, 56))
    tiles = GeoTiffTiles(folder, tile_size=40, max_bad_fraction=0.5)
    assert len(tiles) == 18
    (tmp_path / "gone.tif").unlink()
    found = one_by_one(tiles)
    assert {Path(tile[1]).stem for tile in found} == {*map(str, range(12)), "rotated", "nowhere", "degrees"}
    assert tiles.skipped == {
        "nodata": 1,
        "wrong number of bands": 1,
        "smaller than tile_size": 1,
        "complex numbers": 1,
        "unreadable": 2,
        "empty file": 1,
        "vanished": 1,
    }
    for column, row, width, height in (tile[2] for tile in found):
        assert (column, row, width, height) == (0, 0, 40, 40)


def test_share_of_damage_is_judged_before_a_long_stream_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.data.source.ENOUGH_TO_JUDGE", 50)
    write_many(tmp_path, count=2, height=160, width=160)
    truncate(tmp_path / "0.tif", 0.1)
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, max_bad_fraction=0.2, num_workers=0)
    with pytest.raises(TilesError, match=r"1\d of (5\d|[67]\d) tiles are unreadable, expected at most 20%"):
        list(tiles)
    assert tiles.skips.tried < 100 < len(tiles)


def test_few_damaged_of_many_files_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.data.source.ENOUGH_TO_JUDGE", 20)
    write_many(tmp_path, count=100, height=8, width=8)
    for number in range(5):
        (tmp_path / f"{number}.tif").write_text("no raster")
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, max_bad_fraction=0.06)
    assert len(one_by_one(tiles)) == 95
    assert tiles.skipped == {"unreadable": 5}


def test_files_that_cannot_be_opened_weigh_as_files(tmp_path):
    """Of the windows, two of eight scenes are a small share if those cannot be opened."""
    write_many(tmp_path, count=8, height=160, width=160)
    for number in (3, 5):
        truncate(tmp_path / f"{number}.tif", 0.001)
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, max_bad_fraction=0.05)
    with pytest.raises(
        TilesError, match=r"1 of 8 files are unreadable, expected at most 5% \(max_bad_fraction\): .*/3\.tif"
    ) as err:
        list(tiles)
    assert "RasterioIOError" in str(err.value)  # what GDAL says
    assert len(one_by_one(GeoTiffTiles(str(tmp_path), tile_size=8, max_bad_fraction=0.25))) == 6 * 400


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "other",
    [
        draw(3, 30, 40),
        draw(2, 40, 40),
        draw(1, 40, 40),
        draw(4, 40, 40),
        draw(3, 60, 80),
        draw(3, 40, 40, dtype="complex64"),
    ],
    ids=lambda pixels: f"{pixels.dtype}-{pixels.shape}",
)
def test_file_that_is_replaced_after_it_was_indexed_is_counted(tmp_path, other, workers):
    folder = write_many(tmp_path, count=10, bands=3, height=40, width=40)
    tiles = GeoTiffTiles(folder, tile_size=40, num_workers=workers)
    assert len(tiles) == 10
    write(tmp_path / "3.tif", other)
    assert {Path(tile[1]).stem for tile in one_by_one(tiles)} == set("012456789")
    assert tiles.skipped == {"changed": 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [ValueError, IndexError, OverflowError, ZeroDivisionError, MemoryError, UnicodeEncodeError]
)
def test_whatever_a_file_makes_a_library_raise_is_counted(tmp_path, monkeypatch, error, workers):
    folder = write_many(tmp_path, count=10)
    real = Raster.read

    def read(raster, *args):
        if raster.path.endswith("3.tif"):
            raise error("utf-8", "a", 0, 1, "no") if error is UnicodeEncodeError else error("of a library")
        return real(raster, *args)

    tiles = GeoTiffTiles(folder, tile_size=40, num_workers=workers)
    monkeypatch.setattr(Raster, "read", read)
    assert len(one_by_one(tiles)) == 9
    assert sum(tiles.skipped.values()) == 1


@pytest.mark.parametrize("workers", [0, 3])
def test_too_many_damaged_files_are_an_error_that_names_them(tmp_path, workers):
    for number in range(10):  # lacks data, which must not crowd the damage out of the message
        write(tmp_path / f"blank_{number}.tif", np.zeros((1, 40, 40), np.int16), nodata=0)
    for number in range(10):
        truncate(write(tmp_path / f"cut_{number}.tif", draw(1, 40, 40)), 0.9)
    tiles = GeoTiffTiles(str(tmp_path), tile_size=40, max_bad_fraction=0.4, num_workers=workers)
    with pytest.raises(
        TilesError, match=r"9 of 20 tiles are unreadable, expected at most 40% \(max_bad_fraction\)"
    ) as error:
        list(tiles)
    assert str(error.value).count("/cut_") == 5
    assert "/blank_" not in str(error.value)
    assert not threads_after_a_while()


def test_damaged_description_matters_only_where_bands_are_described(tmp_path):
    path = write(tmp_path / "a.tif", draw(2, 8, 8), descriptions=("BLUEBLUE", "REDRED"))
    path.write_bytes(path.read_bytes().replace(b"BLUEBLUE", b"\xff\xfe\xc3(UE\xe1\xe2"))
    assert len(one_by_one(GeoTiffTiles(str(path), tile_size=8, bands=[2]))) == 1
    with pytest.raises(TilesError, match=r"1 of 1 files are unreadable.*a\.tif \(unreadable\)"):
        list(GeoTiffTiles(str(path), tile_size=8, bands=["REDRED"]))


def test_header_that_claims_more_pixels_than_the_file_can_hold_is_damage(tmp_path):
    folder = write_many(tmp_path, count=12)
    path = tmp_path / "3.tif"
    data = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", data, 4)
    for entry in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] in (256, 257):  # ImageWidth, ImageLength
            struct.pack_into("<HII", data, entry + 2, 4, 1, 60_000)
    path.write_bytes(data)
    with rasterio.open(path) as source:
        assert source.width == 60_000
    tiles = GeoTiffTiles(folder, tile_size=40)
    assert len(tiles) == 11
    assert len(one_by_one(tiles)) == 11
    assert tiles.skipped == {"unreadable": 1}


@pytest.mark.parametrize(
    "options",
    [
        *({"compress": kind, "tiled": True, "blockxsize": 1024, "blockysize": 1024} for kind in ("deflate", "zstd", "lerc")),
        {"compress": "lerc_zstd"},
        {"compress": "deflate", "bigtiff": "yes"},
    ],
)
def test_constant_pixels_compress_far_and_are_no_damage(tmp_path, options):
    path = write(tmp_path / "a.tif", np.ones((1, 4096, 4096), np.float32), **options)
    assert path.stat().st_size < 4096**2 / 50
    tiles = GeoTiffTiles(str(path), tile_size=1024)
    assert len(one_by_one(tiles)) == 16


def test_nearly_empty_scene_is_data(tmp_path):
    shape = {"driver": "GTiff", "width": 40_000, "height": 40_000, "count": 1, "dtype": "uint8", "nodata": 0}
    tiled = {"tiled": True, "blockxsize": 1024, "blockysize": 1024, "compress": "deflate", "sparse_ok": True}
    with rasterio.open(tmp_path / "a.tif", "w", **shape, **tiled) as target:
        target.write(draw(1, 64, 64, dtype="uint8"), window=Window(2048, 4096, 64, 64))
    tiles = GeoTiffTiles(str(tmp_path / "a.tif"), tile_size=64, stride=2048, max_bad_fraction=0)
    ((_, _, window, image, valid),) = one_by_one(tiles)
    assert window == [2048, 4096, 64, 64]
    assert np.array_equal(image, draw(1, 64, 64, dtype="uint8"))
    assert valid.all()
    assert tiles.skipped == {"nodata": len(tiles) - 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of rasterio's logging
@pytest.mark.parametrize(
    "options", [{"blockysize": 6}, {"compress": "deflate", "tiled": True, "blockxsize": 16, "blockysize": 16}]
)
@pytest.mark.parametrize("bands", [None, ["GREEN"]])
def test_damage_anywhere_is_a_counted_skip_or_an_error(tmp_path, options, bands):
    pixels = draw(2, 48, 48)
    path = write(tmp_path / "a.tif", pixels, descriptions=("RED", "GREEN"), nodata=-1, **options)
    intact, rng = path.read_bytes(), random.Random(0)
    start = struct.unpack_from("<I", intact, 4)[0]
    ends, handles = Counter(), open_handles(tmp_path)
    for trial in range(150):
        data = bytearray(intact)
        if trial % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:  # in the header and directory, or anywhere
            where = [*range(8), *range(start, len(data))] if trial % 3 == 1 else range(len(data))
            for at in rng.choices(where, k=4):
                data[at] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        tiles = GeoTiffTiles(str(path), tile_size=16, bands=bands, num_workers=trial % 2, max_bad_fraction=0.5)
        try:
            found = one_by_one(tiles)
        except TilesError:
            ends["error"] += 1
        else:
            assert len(found) + sum(tiles.skipped.values()) == len(tiles)
            ends["skips" if tiles.skipped else "intact"] += 1
    assert all(ends[end] for end in ("error", "skips", "intact")), ends
    assert open_handles(tmp_path) == handles


def open_handles(folder):
    """Files of a folder that are open in this process; those of other tests may wait there for the garbage collector."""
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(handle.readlink())
            found += [target] if target.startswith(f"{folder}/") else []
    return sorted(found)


# Threads and process state


def threads_after_a_while():
    """Reading threads that are still there when they had time to end."""
    for _ in range(50):
        alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("tiles")]
        if not alive:
            return []
        time.sleep(0.1)
    return alive


def test_closing_early_leaves_no_thread(tmp_path):
    stream = iter(GeoTiffTiles(write_many(tmp_path), tile_size=8, stride=4, batch_size=2))
    next(stream)
    assert any(thread.name.startswith("tiles") for thread in threading.enumerate())
    stream.close()
    assert not threads_after_a_while()


def test_abandoning_the_stream_leaves_no_thread(tmp_path):
    for _ in GeoTiffTiles(write_many(tmp_path), tile_size=8, stride=4, batch_size=2):
        assert open_handles(tmp_path)
        break
    assert not threads_after_a_while()
    assert not open_handles(tmp_path)


def test_reading_threads_leave_the_warning_filters_alone(tmp_path):
    tiles = GeoTiffTiles(write_many(tmp_path, count=20, crs=None, transform=None), tile_size=8, num_workers=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(tiles) == 20 * 35
        filters, show = list(warnings.filters), warnings.showwarning
        assert len(one_by_one(tiles)) == len(tiles)
        assert (warnings.filters, warnings.showwarning) == (filters, show)
    assert not caught


# Description and arguments


def test_fingerprint_follows_the_files_and_the_settings(tmp_path):
    folder = write_many(tmp_path)

    def describe(paths=folder, **kwargs):
        return GeoTiffTiles(paths, **{"tile_size": 16, **kwargs}).describe()

    first = describe()
    assert first == describe() == describe(num_workers=0, batch_size=1)
    assert {key: first[key] for key in ("source", "files", "tiles")} == {"source": "GeoTiffTiles", "files": 4, "tiles": 24}
    others = [
        describe([f"{folder}/{n}.tif" for n in range(3)]),
        describe([f"{folder}/{n}.tif" for n in (1, 0, 2, 3)]),
        *(describe(**{name: value}) for name, value in (("seed", 1), ("tile_size", 8), ("stride", 8), ("bands", [1]))),
        *(describe(**{name: 0.5}) for name in ("nodata", "scale", "offset")),
        *(describe(max_nodata_fraction=0.1), describe(num_frames=2), describe(means=[0.0, 0.0], stds=[1.0, 1.0])),
    ]
    assert len({first["fingerprint"], *(other["fingerprint"] for other in others)}) == len(others) + 1
    write(tmp_path / "3.tif", draw(2, 40, 60))
    assert describe()["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"tile_size": 0}, "tile_size is 0, expected at least 1"),
        ({"stride": 0}, "stride is 0, expected at least 1"),
        ({"stride": -3}, "stride is -3, expected at least 1"),
        ({"num_frames": 0}, "num_frames is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"num_workers": -1}, "num_workers is -1, expected at least 0"),
        ({"max_nodata_fraction": 1.1}, "max_nodata_fraction is 1.1, expected 0 to 1"),
        ({"max_nodata_fraction": float("nan")}, "max_nodata_fraction is nan, expected 0 to 1"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction is -0.1, expected 0 to 1"),
        ({"bands": []}, "bands is empty, expected at least one"),
        ({"means": [1.0]}, r"means are \[1.0\] and stds None, expected both"),
        ({"pad": "constant"}, "pad is 'constant', expected reflect or null"),
        ({"scale": "image"}, "scale is 'image', expected a number or file"),
        ({"offset": "image"}, "offset is 'image', expected a number or file"),
        ({"timeout": 0}, "timeout is 0, expected seconds above 0"),
        ({"timeout": float("inf")}, "timeout is inf, expected seconds above 0"),
        ({"nodata": 10**400}, r"nodata is 1000\d+\.\.\., expected a number"),
        ({"filename_regex": "(?P<date>"}, r"filename_regex is .*, expected a regular expression \("),
        (
            {"filename_regex": "(?P<date>.*)", "date_format": "%Y%Y"},
            r"date_format is '%Y%Y', expected codes of strptime, each",
        ),
        ({"filename_regex": "(?P<date>.*)", "date_format": "%Q"}, r"date_format is '%Q', expected codes of strptime"),
        ({"index_cache": "a\0b"}, r"index_cache is 'a\\x00b', expected a path"),
        ({"filename_regex": "(.*)"}, r"filename_regex is .*, expected a group \(\?P<date>"),
        (
            {"use_metadata": True, "num_frames": 2},
            "use_metadata with 2 frames stacked in bands, expected one file",
        ),
        ({"stds": [1.0]}, r"means are None and stds \[1.0\], expected both"),
        ({"means": [1.0], "stds": [1.0, 1.0]}, "expected both with one value per band, or neither"),
        ({"means": [1.0], "stds": []}, "expected both with one value per band, or neither"),
        ({"means": [], "stds": []}, "expected both with one value per band, or neither"),
        ({"means": [1.0, 1.0], "stds": [1.0, 0.0]}, r"stds are \[1.0, 0.0\], expected values above 0"),
    ],
)
def test_arguments_without_a_meaning_are_refused(tmp_path, kwargs, expected):
    path = write(tmp_path / "a.tif", draw(1, 8, 8))
    with pytest.raises(TilesError, match=expected) as error:
        GeoTiffTiles(str(path), **kwargs)
    assert str(error.value).endswith(".")


def test_tiles_that_no_memory_holds_are_refused(tmp_path):
    path = write(tmp_path / "a.tif", draw(1, 8, 8))
    for size in (10**6, 10**9, 10**30):
        with pytest.raises(TilesError, match=rf"Not enough memory for a batch of 16 x 1 x {size} x {size} pixels: reduce"):
            list(GeoTiffTiles(str(path), tile_size=size, pad="reflect"))


# Real rasters


@pytest.mark.parametrize(
    ("paths", "tile_size", "bands", "files"),
    [
        ("hls_water/images/*.tif", 128, 6, 204),
        ("hls_water/qa/*.tif", 128, 1, 204),
        ("terramind_examples/**/*S2L2A*/**/*.tif", 224, 12, 3),
        ("terramind_examples/**/*S1RTC*/**/*.tif", 224, 2, 3),
        ("sen1floods11_sample/**/*S2Hand*.tif", 128, 13, 3),
        ("sen1floods11_sample/**/*S1Hand*.tif", 128, 2, 3),
        ("ukis_csmask/**/images/*.tif", 128, 6, 2),
        ("terratorch_hls_tile/*input*.tif", 112, 10, 1),
        ("scenes/s2_20m_6band_epsg5070.tif", 128, 6, 1),
        ("scenes/L7_ETMs.tif", 112, 6, 1),
        ("scenes/cog_nodata.tif", 224, 1, 1),
    ],
)
def test_real_rasters(shared_data, paths, tile_size, bands, files):
    tiles = GeoTiffTiles(str(shared_data / paths), tile_size=tile_size, stride=tile_size - 30, max_bad_fraction=0)
    assert len(tiles.paths) == files
    found = one_by_one(tiles)
    assert len(found) + tiles.skipped.get("nodata", 0) == len(tiles) > 0
    assert set(tiles.skipped) <= {"nodata"}
    for _, path, (column, row, width, height), image, valid in found:
        assert image.shape == (bands, tile_size, tile_size)
        with rasterio.open(path) as source:
            expected = source.read(window=Window(column, row, width, height), masked=True)
        gaps = np.ma.getmaskarray(expected) | ~np.isfinite(expected.data)
        assert np.array_equal(~valid, gaps.any(axis=0))
        assert np.array_equal(image[:, valid], expected.data.astype(np.float32)[:, valid])
        assert torch.isfinite(image).all()
    if "scenes/s2" in paths or "scenes/cog" in paths:
        assert tiles.skipped["nodata"] > 0
        assert not all(tile[4].all() for tile in found)


def test_whole_folder_of_real_rasters_of_every_kind(shared_data):
    """Sizes, types, CRS, compression and nodata mixed; files with few bands are counted."""
    tiles = GeoTiffTiles(str(shared_data), tile_size=128, bands=[1, 2, 3], max_bad_fraction=1)
    found = one_by_one(tiles)
    assert {tile[3].shape for tile in found} == {(3, 128, 128)}
    assert len({Path(tile[1]).parts[len(shared_data.parts)] for tile in found}) == 6
    assert tiles.skipped["wrong bands"] > 600
    assert tiles.skipped["picture"] == 1400
    assert len(found) + tiles.skipped["nodata"] == len(tiles)
    everything = sum(len(files) for _, _, files in os.walk(shared_data))
    assert len(tiles.paths) + tiles.skipped["picture"] + tiles.skipped["no raster"] == everything
