"""Arguments of GeoTiffTiles and names of files as users write them: each means one thing, or is refused by name."""

import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.errors import TilesError
from tests.rasters import draw, one_by_one, write

FUNCTION_SCOPED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def raster(tmp_path_factory):
    """Two bands of 12 x 12 pixels, with descriptions."""
    return str(write(tmp_path_factory.mktemp("raster") / "a.tif", draw(2, 12, 12), descriptions=("RED", "NIR")))


WHOLE = st.integers(0, 12)
SHARE = st.sampled_from([0, 0.25, 0.5, 1])


def spelled(numbers):
    """A number in every type that means it."""
    return numbers.flatmap(
        lambda value: st.sampled_from(
            [value, float(value), np.float32(value), np.float64(value), str(value), f" {value} ", np.array(value)]
            + [torch.tensor(value)]
            + ([np.int16(value), np.uint8(value)] if value == int(value) else [])
        ).map(lambda written: (value, written))
    )


NO_NUMBER = st.one_of(
    st.sampled_from([True, False, np.True_, "", "many", "nan", "inf", "1e400", float("nan"), float("inf"), -float("inf")]),
    st.sampled_from([[], [3], (3,), {}, {3}, b"3", 3j, object(), Decimal("3.5"), np.array([3, 4]), Path("3"), "1,5"]),
)
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=5), st.binary(max_size=3),
    NO_NUMBER, st.lists(st.integers(-3, 3) | st.floats() | st.text(max_size=2) | st.none(), max_size=3),
)  # fmt: skip

# name: (values that mean something, values that mean something else or nothing)
NUMBERS = {
    "tile_size": (st.integers(1, 12), st.sampled_from([0, -1, 2.5, "2.5", None])),
    "stride": (st.integers(1, 12), st.sampled_from([0, -1, 2.5])),
    "num_frames": (st.integers(1, 2), st.sampled_from([0, -1, 1.5, None])),
    "batch_size": (st.integers(1, 20), st.sampled_from([0, -1, 1.5, None])),
    "num_workers": (st.integers(0, 3), st.sampled_from([-1, 0.5, None])),
    "seed": (st.integers(0, 200), st.sampled_from([-1, 0.5, None])),
    "max_nodata_fraction": (SHARE, st.sampled_from([-0.1, 1.1, None])),
    "max_bad_fraction": (SHARE, st.sampled_from([-0.1, 1.1, None])),
    "scale": (st.integers(1, 9), st.none()),
    "offset": (WHOLE, st.none()),
    "timeout": (st.integers(1, 9), st.sampled_from([0, -1, None])),
    "nodata": (WHOLE, st.nothing()),
}
OTHERS = ("bands", "means", "stds", "pad", "filename_regex", "date_format", "use_metadata", "index_cache", "pin_memory")


def stream(raster, **kwargs):
    tiles = GeoTiffTiles(raster, **{"tile_size": 4, "num_workers": 1, **kwargs})
    return [(tile[0], tile[2], tile[3].tolist(), tile[4].tolist()) for tile in one_by_one(tiles)]


@FUNCTION_SCOPED
@given(data=st.data(), name=st.sampled_from(sorted(NUMBERS)))
def test_a_number_means_the_same_in_every_type(raster, data, name):
    value, written = data.draw(spelled(NUMBERS[name][0]))
    assert stream(raster, **{name: written}) == stream(raster, **{name: value})
    assert GeoTiffTiles(raster, **{name: written}).describe() == GeoTiffTiles(raster, **{name: value}).describe()


@FUNCTION_SCOPED
@given(data=st.data(), name=st.sampled_from(sorted(NUMBERS)))
def test_what_is_no_such_number_is_refused_by_name(raster, data, name):
    value = data.draw(NO_NUMBER | NUMBERS[name][1])
    assume(not (name == "nodata" and isinstance(value, float) and np.isnan(value)))  # the value of gaps
    with pytest.raises(TilesError, match=rf"^{name} is (?s:.*), expected .*: change {name}\.$"):
        GeoTiffTiles(raster, **{name: value})


@FUNCTION_SCOPED
@given(name=st.sampled_from([*sorted(NUMBERS), *OTHERS]), value=ANYTHING)
@example(name="scale", value=np.array([1.0, 2.0]))
@example(name="pad", value=np.array(["reflect", "x"]))
@example(name="bands", value="NIR")
@example(name="bands", value=True)
@example(name="bands", value=[[1]])
@example(name="use_metadata", value=None)
def test_anything_works_or_is_refused_by_name(raster, name, value):
    large = isinstance(value, int | float | str) and name in ("batch_size", "num_workers")
    assume(not large)  # memory and threads that nobody has
    assume(not (name == "index_cache" and isinstance(value, str)))  # names a file, which is written
    try:
        with_dates = {"filename_regex": r"(?P<date>a)"} if name == "date_format" else {}
        stream(raster, **with_dates, **{name: value})
    except TilesError as err:
        message = str(err)
        assert name in message or "window of" in message or "frames" in message or "(" in message
        assert ": " in message
        assert message.endswith(".")


@pytest.mark.parametrize(
    ("given_bands", "same"),
    [((1, 2), [1, 2]), (np.array([2, 1]), [2, 1]), (2, [2]), ("NIR", ["NIR"]), ([2.0, np.int64(1)], [2, 1]),
     (np.array(["NIR", "RED"]), ["NIR", "RED"]), (torch.tensor([1]), [1])],
)  # fmt: skip
def test_bands_in_every_container(raster, given_bands, same):
    assert stream(raster, bands=given_bands) == stream(raster, bands=same)
    assert GeoTiffTiles(raster, bands=given_bands).bands == same


@pytest.mark.parametrize("bands", [True, [True], [None], [1.5], [float("nan")], {1, 2}, b"RED", [[1]], 1j, []])
def test_what_are_no_bands(raster, bands):
    with pytest.raises(TilesError, match=r"^bands is .*, expected .*bands"):
        GeoTiffTiles(raster, bands=bands)


@pytest.mark.parametrize("container", [tuple, np.array, torch.tensor, lambda values: [str(value) for value in values]])
def test_statistics_in_every_container(raster, container):
    expected = stream(raster, means=[1.0, 2.0], stds=[2.0, 4.0])
    assert stream(raster, means=container([1.0, 2.0]), stds=container([2.0, 4.0])) == expected
    assert stream(raster, bands=[2], means=1, stds=np.float32(2)) == stream(raster, bands=[2], means=[1.0], stds=[2.0])


@pytest.mark.parametrize(
    "values", [[float("nan"), 1.0], [None, 1.0], ["a", 1.0], {1.0, 2.0}, [True, 1.0], [float("inf"), 1.0]]
)
@pytest.mark.parametrize("name", ["means", "stds"])
def test_what_are_no_statistics(raster, name, values):
    with pytest.raises(TilesError, match=rf"^{name} is .*, expected numbers, one per band: change {name}\.$"):
        GeoTiffTiles(raster, **{"means": [1.0, 1.0], "stds": [1.0, 1.0], name: values})


@pytest.mark.parametrize(
    "paths", [None, 3, True, "", b"a.tif", [None], [3], [["a.tif"]], {"a": 1}.values(), ["a\0b.tif"], [""]]
)
def test_what_are_no_paths(paths):
    with pytest.raises(TilesError, match=r"^paths contains (?s:.*), expected a file, folder, glob.*: check paths\.$"):
        GeoTiffTiles(paths)


@pytest.mark.parametrize(
    "container", [list, tuple, np.array, lambda p: map(Path, p), lambda p: Path(p[0]), lambda p: iter(p)]
)
def test_paths_in_every_container(raster, container):
    assert GeoTiffTiles(container([raster])).paths == [raster]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "{self}", "missing.tif"])
def test_lists_that_are_none(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.format(self=path).encode())
    with pytest.raises(TilesError, match=r", expected .*: "):
        GeoTiffTiles(str(path))


# --- names of files

AWKWARD = [
    *(" ", "[1]", "[!a]", "*", "?", "#", "%20", "%s", "{}", "$HOME", "~", "-", "--bands", ".", "..a", "\n", "\t", "'", '"'),
    *("\\", "!", ";", "&", ":", "a:b", "=", "@", "+", ",", "x" * 200, "C:", "zip+", "s3:", "GTIFF_RAW", "\x7f"),
    *("ü", "e\u0301", "日本", "\N{SATELLITE}"),
]
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="/\0")
NAMES = st.lists(st.sampled_from(AWKWARD) | st.text(CHARACTERS, max_size=8), max_size=3).map("".join)
ENDINGS = st.sampled_from([".tif", ".TIF", ".tiff", ".TIFF", ".Tif"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, ending=ENDINGS, folder=NAMES, own=st.booleans())
@example(name="", ending=".tif", folder="", own=True)
@example(name="a[1]", ending=".tif", folder="b[0]*", own=True)
@example(name="-x", ending=".TIFF", folder="--help", own=False)
@example(name="x", ending=".tif", folder="s3:", own=False)
def test_a_file_that_is_there_is_found_once_whatever_its_name(tmp_path_factory, name, ending, folder, own):
    root = tmp_path_factory.mktemp("names")
    name += ending
    assume(len(os.fsencode(name)) <= 255 and len(os.fsencode(folder)) <= 255 and folder not in (".", ".."))
    place = root / folder if folder else root
    place.mkdir(exist_ok=True)
    plain = write(root.parent / f"{root.name}.tif", draw(1, 4, 4))
    path = f"{place}/{name}"
    os.rename(plain, path)
    by_folder = (str(place), [str(place), path], f"{place}/") if not name.startswith(".") else ()  # else it is hidden
    for paths in (path, [path, f"{place}/./{name}"], Path(path), *by_folder):
        tiles = GeoTiffTiles(paths, tile_size=4, num_workers=1)
        assert [os.path.abspath(found) for found in tiles.paths] == [os.path.abspath(path)]
        if own:
            ((_, found, _, image, _),) = one_by_one(tiles)
            assert np.array_equal(image, draw(1, 4, 4))
            assert os.path.samefile(found, path)
    os.remove(path)


def test_a_name_that_is_no_text_is_found_and_counted(tmp_path):
    write(tmp_path / "good.tif", draw(1, 4, 4))
    os.rename(write(tmp_path / "bad.tif", draw(1, 4, 4)), os.fsencode(str(tmp_path)) + b"/\xff\xfe.tif")
    tiles = GeoTiffTiles(str(tmp_path), tile_size=4, max_bad_fraction=1.0)
    assert len(tiles.paths) == 2
    assert tiles.describe() == tiles.describe()
    found = one_by_one(tiles)
    assert len(found) + sum(tiles.skipped.values()) == 2
    assert len(found) >= 1


def test_a_relative_and_an_absolute_path_are_one_file(tmp_path, monkeypatch):
    write(tmp_path / "a.tif", draw(1, 4, 4))
    monkeypatch.chdir(tmp_path)
    assert GeoTiffTiles(["a.tif", "./a.tif", str(tmp_path / "a.tif"), "."]).paths == ["a.tif"]


# --- masks beside the images


@pytest.mark.parametrize("bands", [None, [1, 2, 3]])
def test_masks_beside_the_images_are_answered_with_a_glob(tmp_path, bands):
    for number in range(6):
        write(tmp_path / f"a{number}.mask.tif", draw(1, 8, 8))
        write(tmp_path / f"a{number}_merged.tif", draw(6, 8, 8))
    with pytest.raises(
        TilesError, match=r"name the images alone by a glob in paths, such as /data/\*_image\.tif, or"
    ) as error:
        list(GeoTiffTiles(str(tmp_path), tile_size=8, bands=bands))
    assert "a0.mask.tif (wrong " in str(error.value)
    assert "merged" not in str(error.value)  # the images are not what is wrong
    assert len(one_by_one(GeoTiffTiles(str(tmp_path / "*_merged.tif"), tile_size=8, bands=bands))) == 6
