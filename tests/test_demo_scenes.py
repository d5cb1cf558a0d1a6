"""The demo's scenes: what the files hold, that a seed fixes them, and that the classes can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray

from terratorch_simpler.demo.scenes import BANDS, CLASSES, CLOUD_LABEL, NODATA, draw_scene, write_scenes

Scenes = list[tuple[NDArray[np.int16], NDArray[np.int16]]]
SIZE = 64
COUNT = 40  # more than one row of the grid on which the scenes stand


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes")
    write_scenes(path, {"train": COUNT - 4, "val": 4}, size=SIZE, seed=5)
    return path


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return [draw_scene((5, i), 96) for i in range(COUNT)]


def read(path: Path) -> NDArray[np.int16]:
    with rasterio.open(path) as source:
        pixels: NDArray[np.int16] = source.read()
    return pixels


def test_splits_name_every_scene_once_and_no_temporary_file_stays(folder: Path) -> None:
    ids = [(folder / "splits" / f"{split}.txt").read_text().split() for split in ("train", "val")]
    assert [len(split) for split in ids] == [COUNT - 4, 4]
    assert ids[0] + ids[1] == [f"scene_{i:04d}" for i in range(COUNT)]
    expected = {f"images/{i}_image.tif" for i in ids[0] + ids[1]} | {f"masks/{i}_mask.tif" for i in ids[0] + ids[1]}
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == expected | {"splits/train.txt", "splits/val.txt"}


def test_geotiffs_carry_what_a_reader_needs(folder: Path) -> None:
    for path in sorted((folder / "images").iterdir()):
        mask_path = folder / "masks" / path.name.replace("_image", "_mask")
        with rasterio.open(path) as image, rasterio.open(mask_path) as mask:
            assert (image.count, image.dtypes, image.nodata) == (6, ("int16",) * 6, NODATA)
            assert image.descriptions == BANDS
            assert image.compression.name == "deflate"
            assert (mask.count, mask.dtypes, mask.nodata) == (1, ("int16",), None)
            assert image.crs == mask.crs == rasterio.CRS.from_epsg(32632)
            assert image.shape == mask.shape == (SIZE, SIZE)
            assert image.transform == mask.transform
            assert (image.transform.a, image.transform.b, image.transform.d, image.transform.e) == (30, 0, 0, -30)


def test_scenes_do_not_overlap(folder: Path) -> None:
    boxes = []
    for path in (folder / "images").iterdir():
        with rasterio.open(path) as image:
            boxes.append(image.bounds)
    assert len(boxes) == COUNT
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a.right <= b.left or b.right <= a.left or a.top <= b.bottom or b.top <= a.bottom


def test_files_hold_the_drawn_scene_however_many_are_written(folder: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, {"test": 2}, size=SIZE, seed=5)
    for number in range(2):
        image, mask = draw_scene((5, number), SIZE)
        for root in (folder, tmp_path):
            np.testing.assert_array_equal(read(root / f"images/scene_{number:04d}_image.tif"), image)
            np.testing.assert_array_equal(read(root / f"masks/scene_{number:04d}_mask.tif")[0], mask)


def test_seed_decides_the_scene() -> None:
    first, again, other = draw_scene(1, SIZE), draw_scene(1, SIZE), draw_scene(2, SIZE)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).mean() > 0.3
    first_set, other_set = draw_scene((0, 1), SIZE)[0], draw_scene((1, 0), SIZE)[0]
    assert (first_set != other_set).mean() > 0.3


def test_a_scene_looks_as_it_always_has() -> None:
    """The figures of the documentation and what the notebooks find are of these scenes."""
    near_infrared = draw_scene((5, 1), 96)[0][3].reshape(6, 16, 6, 16).mean((1, 3))
    expected = [
        [2659, 2808, 2485, 2607, 2602, 2705],
        [3166, 2403, 2363, 2667, 2319, 2475],
        [2469, 2654, 2409, 2761, 2317, 2303],
        [2246, 2488, 2219, 2691, 1777, 2406],
        [2274, 2278, 2343, 2943, 2372, 2319],
        [2161, 2415, 2757, 3042, 2698, 2215],
    ]
    np.testing.assert_allclose(near_infrared, expected, rtol=0.01)


def test_every_class_has_its_share(scenes: Scenes) -> None:
    labels = np.concatenate([mask.ravel() for _, mask in scenes])
    assert set(np.unique(labels)) == {CLOUD_LABEL, *range(len(CLASSES))}
    shares = np.bincount(labels[labels >= 0], minlength=len(CLASSES)) / (labels >= 0).sum()
    assert shares.min() > 0.03, dict(zip(CLASSES, shares.round(3), strict=True))
    assert 0.005 < (labels == CLOUD_LABEL).mean() < 0.2


def test_missing_pixels_miss_in_all_bands_and_are_ignored(scenes: Scenes) -> None:
    with_gap = 0
    for image, mask in scenes:
        missing = image == NODATA
        assert (missing.all(axis=0) == missing.any(axis=0)).all()
        assert (mask[missing[0]] == CLOUD_LABEL).all()
        assert image[~missing].min() >= 0
        assert image[~missing].max() <= 10000
        with_gap += bool(missing.any())
    assert 1 <= with_gap <= COUNT // 2


def test_clouds_are_bright_and_ignored(scenes: Scenes) -> None:
    cloudy = [image[:, (mask == CLOUD_LABEL) & (image[0] != NODATA)] for image, mask in scenes]
    assert 5 <= sum(pixels.shape[1] > 0 for pixels in cloudy) <= 25
    assert np.median(np.concatenate(cloudy, axis=1), axis=1).min() > 2000


def test_spectra_are_those_of_land(scenes: Scenes) -> None:
    pixels = np.concatenate([image.reshape(6, -1) for image, _ in scenes], axis=1)
    labels = np.concatenate([mask.ravel() for _, mask in scenes])
    mean = {name: dict(zip(BANDS, pixels[:, labels == i].mean(axis=1), strict=True)) for i, name in enumerate(CLASSES)}
    assert mean["forest"]["NIR_NARROW"] > 4 * mean["forest"]["RED"]
    assert mean["forest"]["SWIR_1"] < mean["forest"]["NIR_NARROW"]
    assert mean["water"]["NIR_NARROW"] < 600
    assert mean["bare"]["BLUE"] < mean["bare"]["GREEN"] < mean["bare"]["RED"] < mean["bare"]["SWIR_1"]
    assert mean["built"]["BLUE"] > mean["grass"]["BLUE"]
    valid = pixels[:, pixels[0] != NODATA].mean(axis=1)
    np.testing.assert_allclose(valid, [530, 866, 1026, 2071, 1959, 1365], rtol=0.35)  # mean of real HLS tiles


def test_a_scene_too_small_for_its_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        draw_scene(0, 16)
