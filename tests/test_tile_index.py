"""What is known of files before a pixel is read: headers and their cache, bands, series of dates, the grid of windows."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.data.index import Grid, read_headers
from terratorch_simpler.data.rasters import Raster
from terratorch_simpler.errors import SimplerWarning, TilesError
from tests.rasters import draw, one_by_one, write, write_many

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # of writing

# Grid


sides = st.integers(1, 300)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), st.integers(1, 80), st.integers(1, 100))
def test_grid_numbers_every_window_once(sizes, tile, stride):
    grid = Grid([(f"{number}",) for number in range(len(sizes))], sizes, tile, stride)
    expected = [
        (f"{number}", column, row)
        for number, (width, height) in enumerate(sizes)
        for row in range(0, max(1, height - tile + 1), stride)
        for column in range(0, max(1, width - tile + 1), stride)
    ]
    places = [grid[number] for number in range(len(grid))]
    assert [(place.paths[0], place.column, place.row) for place in places] == expected
    assert [place.number for place in places] == list(range(len(grid)))
    for place in places:
        width, height = sizes[int(place.paths[0])]
        assert (place.width, place.height) == (min(tile, width), min(tile, height))
        assert 0 <= place.column <= place.column + place.width <= width
        assert 0 <= place.row <= place.row + place.height <= height
    for outside in (-1, len(grid)):
        with pytest.raises(IndexError):
            grid[outside]


def test_grid_of_many_windows_takes_no_memory_for_each():
    grid = Grid([("a",), ("b",)], [(10**6, 10**6)] * 2, 224, 1)
    assert len(grid) == 2 * (10**6 - 223) ** 2
    last = grid[len(grid) - 1]
    assert (last.paths, last.column, last.row) == (("b",), 10**6 - 224, 10**6 - 224)


# Headers


def test_headers_are_read_without_pixels(tmp_path, monkeypatch):
    folder = write_many(tmp_path, count=300)
    monkeypatch.setattr(Raster, "read", lambda *_: pytest.fail("read pixels"))
    tiles = GeoTiffTiles(folder, tile_size=8)
    assert len(tiles) == 300 * 35


def counted(monkeypatch):
    """Paths of the files that are opened from here on."""
    opened = []
    real = Raster.__init__
    monkeypatch.setattr(
        Raster, "__init__", lambda self, path, *a, **k: opened.append(Path(path).name) or real(self, path, *a, **k)
    )
    return opened


def test_cache_saves_opening_files_that_have_not_changed(tmp_path, monkeypatch):
    folder = write_many(tmp_path / "scenes", count=5, descriptions=("RED", None))
    (tmp_path / "scenes" / "text.tif").write_text("no raster")
    cache = tmp_path / "out" / "tiles.json"

    def index(**kwargs):
        return GeoTiffTiles(folder, tile_size=8, max_bad_fraction=1, index_cache=str(cache), **kwargs)

    opened = counted(monkeypatch)
    assert len(index()) == 5 * 35
    assert len(opened) == 6
    assert [path.name for path in cache.parent.iterdir()] == ["tiles.json"]
    opened.clear()
    assert len(index(bands=["RED"])) == 5 * 35
    assert opened == ["text.tif"]  # what could not be read is tried again
    opened.clear()
    write(tmp_path / "scenes" / "3.tif", draw(2, 16, 16))
    os.utime(tmp_path / "scenes" / "4.tif", ns=(1, 1))
    assert len(index()) == 4 * 35 + 4
    assert sorted(opened) == ["3.tif", "4.tif", "text.tif"]
    assert len(one_by_one(index())) == 4 * 35 + 4


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"format": "terratorch-simpler/tile-index", "version": 1, "files": {"a": [1,',
        '{"format": "terratorch-simpler/tile-index", "version": 1}',
        '{"format": "terratorch-simpler/tile-index", "version": 1, "files": {"a": [1, 2]}}',
        '{"format": "terratorch-simpler/tile-index", "version": 1, "files": {"a": [1, 1, -5, 5, true, null, 1]}}',
        '{"format": "terratorch-simpler/tile-index", "version": 1, "files": {"a": [1, 1, "5", 5, true, null, 1]}}',
        '{"format": "terratorch-simpler/tile-index", "version": 1, "files": {"a": [1, 1, 5, 5, 1, null, 1]}}',
        '{"format": "terratorch-simpler/tile-index", "version": 1, "files": {"a": [1, 1, 5, 5, true, [3], 1]}}',
        '{"format": "terratorch-simpler/tile-index", "version": 1, "files": {"a": [1, 1, 5, 1000000000000, true, null, 1]}}',
        '{"format": "terratorch-simpler/tile-index", "version": 1, "files": ' + "[" * 100_000,
    ],
)
def test_damaged_cache_is_made_anew(tmp_path, content):
    folder = write_many(tmp_path / "scenes")
    cache = tmp_path / "tiles.json"
    cache.write_text(content)
    tiles = GeoTiffTiles(folder, tile_size=8, index_cache=str(cache))
    with pytest.warns(SimplerWarning, match=r"^The index of tiles .*tiles\.json is damaged and will be rebuilt\.$"):
        assert len(tiles) == 140
    assert len(json.loads(cache.read_text())["files"]) == 4


def test_sidecars_are_part_of_a_file(tmp_path):
    """Band names in .aux.xml change what a header says, not the raster."""
    path = write(tmp_path / "a.tif", draw(2, 8, 8), tags=None)
    index = str(tmp_path / "index.json")
    for names in ("RB", "BR"):
        bands = "".join(
            f'<PAMRasterBand band="{n}"><Description>{x}</Description></PAMRasterBand>' for n, x in enumerate(names, 1)
        )
        Path(f"{path}.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")
        ((_, _, _, image, _),) = one_by_one(GeoTiffTiles(str(path), tile_size=8, bands=["R"], index_cache=index))
        assert np.array_equal(image[0], draw(2, 8, 8)[names.index("R")])


@pytest.mark.filterwarnings("error::terratorch_simpler.errors.SimplerWarning")
def test_cache_of_old_files_is_used(tmp_path, monkeypatch):
    folder = write_many(tmp_path / "scenes", count=3)
    os.utime(tmp_path / "scenes" / "1.tif", (0, 0))
    index = {"tile_size": 8, "index_cache": str(tmp_path / "index.json")}
    assert len(GeoTiffTiles(folder, **index)) == 105
    opened = counted(monkeypatch)
    assert len(GeoTiffTiles(folder, **index)) == 105
    assert not opened


def test_sizes_that_nobody_has_are_counted(tmp_path):
    write(tmp_path / "a.tif", draw(1, 8, 8))
    size = 2**31 - 1
    (tmp_path / "b.vrt").write_text(
        f'<VRTDataset rasterXSize="{size}" rasterYSize="{size}"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'
    )
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, max_bad_fraction=0.5)
    assert len(one_by_one(tiles)) == 1
    assert tiles.skipped == {"too many windows": 1}


@pytest.mark.parametrize("content", [b"[]", b"II*\0raster", b"\xff\xfe", b'{"weights": 1}', b"my notes"])
def test_no_other_file_is_written_over(tmp_path, content):
    folder = write_many(tmp_path / "scenes")
    mine = tmp_path / "mine"
    mine.write_bytes(content)
    with pytest.raises(TilesError, match=r"^index_cache .*mine is no index of tiles, expected one or a new file: "):
        len(GeoTiffTiles(folder, tile_size=8, index_cache=str(mine)))
    assert mine.read_bytes() == content


def test_an_index_that_cannot_be_kept_is_refused_before_files_are_opened(tmp_path, monkeypatch):
    folder = write_many(tmp_path / "scenes")
    opened = counted(monkeypatch)
    for cache in (tmp_path, tmp_path / "scenes" / "0.tif" / "tiles.json"):
        with pytest.raises(TilesError, match=r"index_cache .*, expected .*: change index_cache\.$"):
            len(GeoTiffTiles(folder, tile_size=8, index_cache=str(cache)))
    assert not opened


def test_cache_of_another_version_is_made_anew(tmp_path):
    folder = write_many(tmp_path / "scenes")
    cache = tmp_path / "tiles.json"
    cache.write_text('{"format": "terratorch-simpler/tile-index", "version": 2, "files": 0}')
    assert len(GeoTiffTiles(folder, tile_size=8, index_cache=str(cache))) == 140
    assert json.loads(cache.read_text())["version"] == 1


def test_headers_do_not_depend_on_the_number_of_threads(tmp_path):
    write_many(tmp_path, count=80)
    (tmp_path / "text.tif").write_text("no raster")
    paths = sorted(map(str, tmp_path.glob("*.tif")))
    expected = read_headers(paths, 0, 60.0, None)
    assert len(expected) == 81
    assert expected == read_headers(paths, 1, 60.0, None) == read_headers(paths, 7, 60.0, None)
    assert read_headers([], 4, 60.0, None) == []


# Bands


def test_files_with_another_number_of_bands_than_most_are_skipped(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number:02}.tif", draw(3 if number == 0 else 2, 8, 8))
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8)
    assert {Path(path).stem for _, path, *_ in one_by_one(tiles)} == {f"{number:02}" for number in range(1, 20)}
    assert tiles.skipped == {"wrong number of bands": 1}
    assert "00.tif (wrong number of bands)" in str(tiles.skips)
    assert len(one_by_one(GeoTiffTiles(str(tmp_path), tile_size=8, bands=[1, 2]))) == 20


def test_files_without_a_named_band_are_skipped(tmp_path):
    for number in range(20):
        names = ("SWIR", "RED", "NIR") if number == 7 else ("RED", "GREEN", "BLUE")
        write(tmp_path / f"{number:02}.tif", draw(3, 8, 8, seed=number), descriptions=names)
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, bands=["RED", "BLUE"])
    assert len(one_by_one(tiles)) == 19
    assert tiles.skipped == {"wrong bands": 1}
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, bands=["RED"])
    found = {Path(path).stem: image for _, path, _, image, _ in one_by_one(tiles)}
    assert np.array_equal(found["07"], draw(3, 8, 8, seed=7)[[1]])  # wherever the band is in its file
    assert np.array_equal(found["06"], draw(3, 8, 8, seed=6)[[0]])


# Files smaller than a tile


@pytest.mark.parametrize(("height", "width"), [(10, 13), (10, 40), (40, 13), (1, 1), (16, 16)])
def test_small_files_are_mirrored_when_asked(tmp_path, height, width):
    pixels = draw(2, height, width)
    pixels[0, 0, 0] = 0
    path = write(tmp_path / "a.tif", pixels, nodata=0)
    tiles = GeoTiffTiles(str(path), tile_size=16, pad="reflect", max_nodata_fraction=1)
    found = one_by_one(tiles)
    expected = {(x, y) for x in range(0, max(1, width - 15), 16) for y in range(0, max(1, height - 15), 16)}
    if (height, width) == (1, 1):
        assert tiles.skipped == {"nodata": 1}
        return
    assert {(x, y) for _, _, (x, y, _, _), _, _ in found} == expected
    for _, _, (x, y, w, h), image, valid in found:
        assert (w, h) == (min(16, width), min(16, height))
        part = pixels[:, y : y + h, x : x + w]
        known = (part != 0).all(axis=0)
        assert np.array_equal(valid[:h, :w], known)
        assert not valid[h:].any()
        assert not valid[:, w:].any()
        assert np.array_equal(image[:, :h, :w][:, known], part[:, known])
        full = np.pad(image[:, :h, :w], [(0, 0), (0, 16 - h), (0, 16 - w)], mode="reflect")
        assert np.array_equal(image, full)


# Series of dates

HLS = r"HLS\.(?P<sensor>[LS]30)\.(?P<tile>T\w{5})\.(?P<date>\d{7})"


def write_dates(folder, places, dates, height=16, width=24):
    """One file a place and date, each with pixels of its own."""
    for place in places:
        for date in dates:
            write(folder / f"{place}_{date}_sr.tif", draw(2, height, width, seed=hash((place, date)) % 1000))


def test_frames_are_the_files_of_a_place_in_order_of_their_dates(tmp_path):
    write_dates(tmp_path, ("north", "south"), ("20210305", "20201224", "20210101", "20210720", "20220101"))
    (tmp_path / "notes_sr.tif").write_text("not part of a series")
    tiles = GeoTiffTiles(
        str(tmp_path), tile_size=8, num_frames=2, filename_regex=r"\w+?_(?P<date>\d{8})_sr", max_bad_fraction=1
    )
    found = one_by_one(tiles)
    runs = {"20201224": "20210101", "20210305": "20210720"}  # the first date of each run, and the second
    assert len(found) == 2 * 2 * 6
    assert tiles.skipped == {"unreadable": 1, "too few dates": 2}
    for _, path, (x, y, _, _), image, valid in found:
        place, first, _ = Path(path).stem.split("_")
        assert image.shape == (2, 2, 8, 8)
        assert valid.shape == (8, 8)
        for frame, date in enumerate((first, runs[first])):
            with rasterio.open(tmp_path / f"{place}_{date}_sr.tif") as source:
                assert np.array_equal(image[:, frame], source.read()[:, y : y + 8, x : x + 8])


def test_dates_are_put_in_order_not_names(tmp_path):
    # The first of February, the second of January.
    write_dates(tmp_path, ("a",), ("01022020", "02012020"), height=8, width=8)
    arguments = {"tile_size": 8, "num_frames": 2, "filename_regex": r"a_(?P<date>\d{8})", "date_format": "%d%m%Y"}
    ((_, path, _, image, _),) = one_by_one(GeoTiffTiles(str(tmp_path), **arguments))
    assert Path(path).stem == "a_02012020_sr"
    for frame, date in enumerate(("02012020", "01022020")):
        with rasterio.open(tmp_path / f"a_{date}_sr.tif") as source:
            assert np.array_equal(image[:, frame], source.read())


def test_files_of_one_place_and_date_are_no_time_series(tmp_path):
    """Bands in files of their own, or an image that was processed again."""
    for date in ("20210101", "20210202"):
        for band in ("B02", "B03", "B04"):
            write(tmp_path / f"T32TQM_{date}_{band}.tif", draw(1, 8, 8))
    arguments = {"tile_size": 8, "num_frames": 2, "filename_regex": r"(?P<tile>T\w{5})_(?P<date>\d{8})_(?P<band>B\d\d)"}
    tiles = GeoTiffTiles(str(tmp_path), **arguments)
    ((_, path, _, image, _),) = one_by_one(tiles)
    assert Path(path).stem == "T32TQM_20210101_B02"
    for frame, date in enumerate(("20210101", "20210202")):
        with rasterio.open(tmp_path / f"T32TQM_{date}_B02.tif") as source:
            assert np.array_equal(image[:, frame], source.read())
    assert tiles.skipped == {"same place and date as another file": 4}


def test_place_is_the_tile_of_the_name_where_it_has_one(tmp_path):
    for name in ("HLS.S30.T32TQM.2020035.v1", "HLS.L30.T32TQM.2020031.v2", "HLS.S30.T31TAA.2020031.v1"):
        write(tmp_path / f"{name}.tif", draw(1, 8, 8))
    arguments = {"tile_size": 8, "filename_regex": HLS, "date_format": "%Y%j"}
    ((_, path, _, _, _),) = one_by_one(GeoTiffTiles(str(tmp_path), num_frames=2, **arguments))
    assert "2020031.v2" in path
    assert len(one_by_one(GeoTiffTiles(str(tmp_path), **arguments))) == 3


def test_folders_named_by_date_do_not_part_a_place(tmp_path):
    for date in ("20200101", "20200201"):
        write(tmp_path / date / f"a_{date}.tif", draw(1, 8, 8))
    write(tmp_path / "elsewhere" / "a_20200301.tif", draw(1, 8, 8))
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, num_frames=2, filename_regex=r".*_(?P<date>\d{8})")
    assert len(one_by_one(tiles)) == 1
    assert tiles.skipped == {"too few dates": 1}


def test_names_without_a_date_and_unequal_sizes_are_counted(tmp_path):
    write_dates(tmp_path, ("a", "b"), ("20200101", "20200201"))
    write(tmp_path / "b_20200201_sr.tif", draw(2, 16, 32))
    write(tmp_path / "c_sr.tif", draw(2, 16, 24))
    write(tmp_path / "d_20209901_sr.tif", draw(2, 16, 24))
    tiles = GeoTiffTiles(
        str(tmp_path), tile_size=8, num_frames=2, filename_regex=r"\w_(?P<date>\d{8})", max_bad_fraction=0.4
    )
    assert {Path(path).name for _, path, *_ in one_by_one(tiles)} == {"a_20200101_sr.tif"}
    assert tiles.skipped == {"name without a date": 2, "dates of unequal size": 2}


def test_gap_in_one_date_is_a_gap_of_the_tile(tmp_path):
    for date, hole in (("20200101", (0, 0)), ("20200201", (3, 5))):
        pixels = draw(2, 8, 8)
        pixels[(1, *hole)] = -1
        write(tmp_path / f"a_{date}.tif", pixels, nodata=-1)
    tiles = GeoTiffTiles(
        str(tmp_path), tile_size=8, num_frames=2, filename_regex=r"a_(?P<date>\d{8})", means=[3.0, 5.0], stds=[2.0, 4.0]
    )
    ((_, _, _, image, valid),) = one_by_one(tiles)
    assert (~valid).nonzero().tolist() == [[0, 0], [3, 5]]
    assert image[1, 0, 0, 0] == image[1, 1, 3, 5] == 0
    assert torch.allclose(image[0, 0], (torch.tensor(draw(2, 8, 8)[0]) - 3) / 2)


# When and where


def test_time_and_place(tmp_path):
    path = write(tmp_path / "a_20200301.tif", draw(1, 16, 16))
    (batch,) = GeoTiffTiles(str(path), tile_size=8, use_metadata=True, filename_regex=r".*_(?P<date>\d{8})")
    assert batch["temporal_coords"].tolist() == [[[2020, 60]]] * 4  # 31 + 29 days before the first of March
    assert batch["temporal_coords"].dtype == batch["location_coords"].dtype == torch.float32
    from pyproj import Transformer

    there = Transformer.from_crs("EPSG:32632", "EPSG:4326", always_xy=True)
    for (column, row, _, _), (latitude, longitude) in zip(
        batch["window"].tolist(), batch["location_coords"].tolist(), strict=True
    ):
        expected = there.transform(500000 + 30 * (column + 4), 5000000 - 30 * (row + 4))
        assert np.allclose((longitude, latitude), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("tags", "day"),
    [
        ({"SENSING_TIME": "2018-06-28T18:44:38.977Z; 2018-06-28T18:45:02Z"}, (2018, 178)),
        ({"DATE_ACQUIRED": "2001-01-01"}, (2001, 0)),
        ({"TIFFTAG_DATETIME": "2019:12:31 23:59:59"}, (2019, 364)),
        ({"DATE_ACQUIRED": "2001-13-01", "TIFFTAG_DATETIME": "2019:01:02 00:00:00"}, (2019, 1)),
        (
            {"ns": "IMAGERY", "ACQUISITIONDATETIME": "2016-02-29 10:00", "TIFFTAG_DATETIME": "2019:01:02 0:0:0"},
            (2016, 59),
        ),
    ],
)
def test_day_from_tags(tmp_path, tags, day):
    namespaced = {"ns": tags.pop("ns"), "ACQUISITIONDATETIME": tags.pop("ACQUISITIONDATETIME")} if "ns" in tags else {}
    path = write(tmp_path / "a.tif", draw(1, 8, 8), tags=tags)
    if namespaced:
        with rasterio.open(path, "r+") as target:
            target.update_tags(**namespaced)
    (batch,) = GeoTiffTiles(str(path), tile_size=8, use_metadata=True)
    assert batch["temporal_coords"].tolist() == [[list(day)]]


def test_files_that_do_not_tell_time_or_place_are_counted_as_damage(tmp_path):
    when = {"DATE_ACQUIRED": "2001-01-01"}
    write_many(tmp_path, count=18, height=8, width=8, tags=when)
    write(tmp_path / "timeless.tif", draw(2, 8, 8))
    write(tmp_path / "nowhere.tif", draw(2, 8, 8), tags=when, crs=None, transform=None)
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, use_metadata=True)
    assert len(one_by_one(tiles)) == 18
    assert tiles.skipped == {"no date": 1, "no location": 1}
    with pytest.raises(TilesError, match=r"expected at most 0% .*timeless\.tif \(no date\)|nowhere\.tif \(no location\)"):
        list(GeoTiffTiles(str(tmp_path), tile_size=8, use_metadata=True, max_bad_fraction=0))


def test_metadata_is_left_out_unless_asked_for(tmp_path):
    (batch,) = GeoTiffTiles(str(write(tmp_path / "a.tif", draw(1, 8, 8))), tile_size=8)
    assert "temporal_coords" not in batch
    assert "location_coords" not in batch


PLACELESS = {
    "no CRS of the Earth": {
        "crs": 'LOCAL_CS["x",UNIT["metre",1]]',
        "transform": rasterio.transform.from_origin(0, 0, 10, 10),
    },
    "beside the Earth": {
        "crs": "+proj=geos +h=35786023 +lon_0=-75 +sweep=x",
        "transform": rasterio.transform.from_origin(-5434894.885, 5434894.885, 32064.27, 32064.27),
    },
    "NaN": {"transform": rasterio.Affine(np.nan, 0, 0, 0, np.nan, 0)},
    "latitude 199": {"crs": "EPSG:4326", "transform": rasterio.transform.from_origin(10, 199, 1e-3, 1e-3)},
    "latitude inf": {"crs": "EPSG:4326", "transform": rasterio.transform.from_origin(10, np.inf, 1e-3, 1e-3)},
}


@pytest.mark.parametrize("kind", PLACELESS)
@pytest.mark.parametrize("workers", [0, 2])
def test_places_that_are_none_are_counted(tmp_path, kind, workers):
    when = {"DATE_ACQUIRED": "2001-01-01"}
    write_many(tmp_path, count=19, height=8, width=8, tags=when)
    write(tmp_path / "odd.tif", draw(2, 8, 8), tags=when, **PLACELESS[kind])
    tiles = GeoTiffTiles(str(tmp_path), tile_size=8, use_metadata=True, num_workers=workers)
    assert len(one_by_one(tiles)) == 19
    assert tiles.skipped == {"no location": 1}
    assert len(one_by_one(GeoTiffTiles(str(tmp_path), tile_size=8, num_workers=workers))) == 20


def test_longitudes_that_go_round_the_other_way(tmp_path):
    place = {"crs": "EPSG:4326", "transform": rasterio.transform.from_origin(199.996, 10.004, 1e-3, 1e-3)}
    path = write(tmp_path / "a.tif", draw(1, 8, 8), tags={"DATE_ACQUIRED": "2001-01-01"}, **place)
    (batch,) = GeoTiffTiles(str(path), tile_size=8, use_metadata=True)
    assert torch.allclose(batch["location_coords"], torch.tensor([[10.0, -160.0]]), atol=1e-4)
