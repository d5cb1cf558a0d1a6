"""Which files are meant by a path: links, hidden files, lists, other formats; and the count of what is left out."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from scipy.io import netcdf_file

from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.errors import TilesError
from tests.rasters import draw, one_by_one, write

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # of writing

SENTENCE = r"^No raster file at (?s:.+), expected .+: .+\.$"


def read(paths, **kwargs):
    """Names of the files that give tiles, and the count of all else."""
    tiles = GeoTiffTiles(paths, **{"tile_size": 8, "max_bad_fraction": 1.0, "num_workers": 2, **kwargs})
    found = one_by_one(tiles)
    names = [path for _, path, *_ in found]
    assert len(set(names)) == len(names)  # one window a file here
    return {os.path.basename(path) for path in names}, tiles.skipped


def chip(path, seed=0):
    return write(Path(path), draw(1, 8, 8, seed=seed))


# Links


def test_a_linked_folder_is_read_once(tmp_path):
    chip(tmp_path / "elsewhere" / "a.tif")
    chip(tmp_path / "data" / "b.tif")
    for name in ("first", "second"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    assert read(str(tmp_path / "data")) == ({"a.tif", "b.tif"}, {"same folder": 1})
    assert read(str(tmp_path / "data" / "**" / "*.tif")) == ({"a.tif", "b.tif"}, {"same folder": 1})


@pytest.mark.parametrize("pattern", ["", "**/*.tif", "*/*.tif", "**/sub/**/a.tif"])
def test_links_that_lead_back_end(tmp_path, pattern):
    """Two of them, followed blindly, make 2^40 paths before the operating system says no."""
    chip(tmp_path / "sub" / "a.tif")
    for name in ("x", "y"):
        (tmp_path / "sub" / name).symlink_to(tmp_path)
        (tmp_path / name).symlink_to(tmp_path)
    names, skipped = read(str(tmp_path / pattern))
    assert names == {"a.tif"}
    assert set(skipped) <= {"same folder", "same file"}


def test_links_that_lead_nowhere_are_counted(tmp_path):
    chip(tmp_path / "a.tif")
    (tmp_path / "b.tif").symlink_to(tmp_path / "gone.tif")
    (tmp_path / "c.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "d").symlink_to(tmp_path / "gone")
    (tmp_path / "e.tif").symlink_to("e.tif")
    assert read(str(tmp_path)) == ({"a.tif"}, {"broken link": 4})
    assert read(str(tmp_path / "*.tif")) == ({"a.tif"}, {"broken link": 2})
    with pytest.raises(TilesError, match=r"2 of 3 files are unreadable, expected at most 50%.*b\.tif \(broken link\)"):
        read(str(tmp_path), max_bad_fraction=0.5)  # c.txt and d were no tiles


def test_one_file_by_several_names_is_one(tmp_path, monkeypatch):
    chip(tmp_path / "sub" / "a.tif")
    (tmp_path / "b.tif").symlink_to("sub/a.tif")
    os.link(tmp_path / "sub" / "a.tif", tmp_path / "c.tif")
    assert read(str(tmp_path)) == ({"b.tif"}, {"same file": 2})
    monkeypatch.chdir(tmp_path)
    assert read(["sub/a.tif", "sub/../sub/a.tif", "./b.tif", str(tmp_path / "c.tif")]) == ({"a.tif"}, {"same file": 2})


def test_folders_that_cannot_be_listed_are_counted(tmp_path, as_nobody):
    for name in ("a", "b"):
        chip(tmp_path / name / f"{name}.tif")
    (tmp_path / "b").chmod(0)
    as_nobody()
    for paths in (tmp_path, tmp_path / "**" / "*.tif", tmp_path / "*" / "*.tif"):
        assert read(str(paths)) == ({"a.tif"}, {"permission denied": 1})
    with pytest.raises(TilesError, match=r"1 of 2 files are unreadable.*/b \(permission denied\)"):
        read(str(tmp_path), max_bad_fraction=0.4)


def test_files_in_a_folder_that_cannot_be_searched_are_counted(tmp_path, as_nobody):
    """Its names can be read, nothing else."""
    for name in ("a.tif", "b/b.tif", "b/notes.txt"):
        chip(tmp_path / name)
    (tmp_path / "b").chmod(0o744)
    as_nobody()
    for paths in (tmp_path, tmp_path / "**" / "*"):
        assert read(str(paths)) == ({"a.tif"}, {"permission denied": 2})


# What is no tile


def test_everything_in_a_folder_is_read_or_counted(tmp_path):
    chip(tmp_path / "a.tif")
    for name in ("._a.tif", ".hidden.tif", ".cache/b.tif"):
        chip(tmp_path / name)
    (tmp_path / "sub").mkdir()
    for name in ("README.md", "sub/a.tif.aux.xml", "Makefile", "list.txt"):
        (tmp_path / name).write_text("no raster")
    for name in ("preview.png", "quicklook.JPG"):
        (tmp_path / name).touch()
    (tmp_path / "b.zip").touch()
    (tmp_path / "c.tif.gz").touch()
    os.mkfifo(tmp_path / "pipe.tif")
    expected = {"hidden": 3, "no raster": 5, "picture": 2, "archive": 2}
    assert read(str(tmp_path), max_bad_fraction=0.0) == ({"a.tif"}, expected)  # none of it is damage
    assert read(str(tmp_path / ".hidden.tif")) == ({".hidden.tif"}, {})  # named
    assert read(str(tmp_path / ".*.tif"))[0] == {"._a.tif", ".hidden.tif"}
    assert read([str(tmp_path / name) for name in ("a.tif", "README.md")])[1] == {"no raster": 1}


def test_a_name_that_is_not_utf8_is_counted(tmp_path):
    chip(tmp_path / "a.tif")
    os.rename(chip(tmp_path / "b.tif"), os.fsencode(str(tmp_path)) + b"/caf\xe9.tif")
    assert read(str(tmp_path)) == ({"a.tif"}, {"name is not UTF-8": 1})


@pytest.mark.parametrize("name", ["zip:a.tif", "file:a.tif", "s3:a.tif", "netcdf:a.tif", "tar:b!a.tif", "GTIFF_DIR:1:a.tif"])
def test_relative_names_that_look_like_urls_are_names(tmp_path, monkeypatch, name):
    chip(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for paths in (name, ".", "*", [name]):
        assert read(paths) == ({name}, {})


def test_globs(tmp_path):
    for name in ("a/x/1.tif", "a/y/2.tif", "b/x/3.tif", "[c]/x/4.tif", "a/.z/5.tif"):
        chip(tmp_path / name)
    for pattern, expected in (
        ("a/*/*.tif", "12"),
        ("*/x/?.tif", "134"),
        ("**/x/*", "134"),
        ("**", "1234"),
        ("[ab]/**/*.tif", "123"),
        ("[c]/x/*.tif", "4"),  # the folder of that name
        ("a*", "12"),  # folders only: what is in them
        ("a/**/**/*.tif", "12"),
    ):
        assert {name[0] for name in read(str(tmp_path / pattern))[0]} == set(expected), pattern


def test_folders_that_a_glob_matches_beside_files_are_counted(tmp_path):
    for name in ("a/1.tif", "b/2.tif"):
        chip(tmp_path / name)
    (tmp_path / "README").write_text("no raster")
    assert read(str(tmp_path / "*")) == ({"1.tif", "2.tif"}, {"no raster": 1})
    chip(tmp_path / "3.tif")
    assert read(str(tmp_path / "*")) == ({"3.tif"}, {"no raster": 1, "folder beside files": 2})


def test_globs_that_say_much_say_it_fast(tmp_path):
    deep = tmp_path.joinpath(*"abcdefghij" * 6)
    chip(deep / "1.tif")
    assert read(str(tmp_path) + "/**" * 12 + "/*.tif")[0] == {"1.tif"}
    assert read(str(tmp_path) + "/." * 1500 + "/**/*.tif")[0] == {"1.tif"}
    with pytest.raises(TilesError, match=SENTENCE):
        read(str(tmp_path) + "/*" * 1500)


# Lists


@pytest.mark.parametrize("name", ["list.txt", "LIST.TXT", "list.lst", "list.csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_as_programs_write_them(tmp_path, monkeypatch, name, encoding, end):
    chip(tmp_path / "data" / "sub" / "a.tif")
    chip(tmp_path / "data" / "übung.tif")
    list_file = tmp_path / "data" / name
    list_file.write_bytes(
        end.join(["# of last year", "", "sub\\a.tif" if "16" in encoding else "sub/a.tif", "übung.tif "]).encode(encoding)
    )
    assert read(str(list_file)) == ({"a.tif", "übung.tif"}, {})
    monkeypatch.chdir(tmp_path)
    assert read(f"data/{name}") == ({"a.tif", "übung.tif"}, {})  # lines are relative to the list


def test_names_in_lists_may_hold_odd_characters(tmp_path):
    for name in ("a\u2028b.tif", "c\x0bd.tif", "#e.tif", "f,g.tif"):
        chip(tmp_path / name)
    (tmp_path / "list.txt").write_text("a\u2028b.tif\nc\x0bd.tif\n./#e.tif\nf,g.tif\n#h.tif\n")
    assert read(str(tmp_path / "list.txt")) == ({"a\u2028b.tif", "c\x0bd.tif", "#e.tif", "f,g.tif"}, {})
    os.rename(tmp_path / "f,g.tif", os.fsencode(tmp_path) + b"/\xe9.tif")
    (tmp_path / "bytes.txt").write_bytes(b"#e.tif\n./#e.tif\n\xe9.tif\n")
    assert read(str(tmp_path / "bytes.txt")) == ({"#e.tif"}, {"name is not UTF-8": 1})  # found as it is


def test_lists_of_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chip("data/a.tif")
    Path("data/inner.txt").write_text("a.tif\n*.tif\n")
    Path("outer.txt").write_text("data/inner.txt\ndata\n")
    assert read("outer.txt") == ({"a.tif"}, {"no raster": 1})
    Path("data/inner.txt").write_text("../outer.txt\n")
    for paths in ("outer.txt", str(tmp_path / "outer.txt"), "./data/../outer.txt"):
        with pytest.raises(TilesError, match=r"outer\.txt is a list that names itself, expected one path per line: "):
            read(paths)


def test_lines_that_name_nothing_are_counted(tmp_path):
    chip(tmp_path / "a.tif")
    (tmp_path / "list.txt").write_text("a.tif\nb.tif\nc/*.tif\n")
    assert read(str(tmp_path / "list.txt")) == ({"a.tif"}, {"vanished": 2})
    (tmp_path / "list.txt").write_text("b.tif\n")
    with pytest.raises(TilesError, match=SENTENCE):
        read(str(tmp_path / "list.txt"))


def test_tables_are_no_lists(tmp_path):
    chip(tmp_path / "a.tif")
    (tmp_path / "table.csv").write_text("path,split\na.tif,train\n")
    with pytest.raises(TilesError, match=r"table\.csv has several columns, expected one path per line: keep the column"):
        read(str(tmp_path / "table.csv"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"# scenes, made by me\na.tif\n", {"a.tif"}),
        ("a.csv", b"path\r\na.tif\r\n", {"a.tif"}),
        ("a.csv", b'"a.tif"\r\n"f,g.tif"\r\n', {"a.tif", "f,g.tif"}),
        ("a.txt", b'"sub\\b.tif"\r\n\x1a', {"b.tif"}),
        ("a.txt", b"sub\\*.tif", {"b.tif"}),
        ("a.txt", b"Fl\xe4che\\*.tif", {"c.tif"}),
        ("a.txt", b"Fl\xe4che\\c.tif", {"c.tif"}),
        ("a.txt", b"Fl\xe4che/**/*.tif", {"c.tif"}),
        ("a.txt", b"Fl\xe4che", {"c.tif"}),
        ("a.csv", b"a.tif;1\r\n", "has several columns, expected"),
        ("a.csv", b'"' + b"x" * 200_000, "field larger than field limit .*: check its quotes"),
        ("a.txt", "a.tif\n".encode("utf-16-le"), "a.txt contains NUL characters, expected a list of paths as UTF-8"),
    ],
)
def test_lists_of_other_programs(tmp_path, name, content, expected):
    for file in ("a.tif", "sub/b.tif", "Fläche/c.tif", "f,g.tif"):
        chip(tmp_path / file)
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, set):
        assert read(str(tmp_path / name)) == (expected, {})
        return
    with pytest.raises(TilesError, match=expected):
        read(str(tmp_path / name))


def test_lists_are_read_once_however_often_they_are_named(tmp_path):
    """Each naming the next twice, 40 lists would be a trillion."""
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number + 1}.txt\n{number + 1}.txt\n")
    (tmp_path / "40.txt").write_text("a.tif\n")
    chip(tmp_path / "a.tif")
    assert read(str(tmp_path / "0.txt")) == ({"a.tif"}, {})
    for number in range(41, 400):
        (tmp_path / f"{number}.txt").write_text(f"{number + 1}.txt\n")
    with pytest.raises(TilesError, match="is a list that names itself"):
        read(str(tmp_path / "41.txt"))


def test_paths_without_an_order_are_refused(tmp_path):
    with pytest.raises(TilesError, match=r"^paths contains \{.*, expected a file, folder"):
        read({str(chip(tmp_path / name)) for name in ("a.tif", "b.tif")})


# Other formats

PIXELS = draw(1, 8, 8, dtype="uint8")


def write_formats(folder):
    """The same pixels in every format."""
    source = write(folder / "source" / "a.tif", PIXELS)
    names = []
    for name, driver, options in (
        ("a.jp2", "JP2OpenJPEG", {"QUALITY": "100", "REVERSIBLE": "YES"}),
        ("b.img", "HFA", {}),
        ("c.vrt", "VRT", {}),
        ("d.png", "PNG", {}),
        ("e", "ENVI", {}),
        *((f"f{ending}", "GTiff", {}) for ending in (".gtiff", ".GeoTIFF", ".gtif", ".btf", "", ".dat")),
    ):
        rasterio.shutil.copy(source, folder / name, driver=driver, **options)
        names.append(name)
    with netcdf_file(folder / "g.nc", "w") as file:
        file.createDimension("y", 8)
        file.createDimension("x", 8)
        file.createVariable("red", "i1", ("y", "x"))[:] = PIXELS[0].astype(np.int8)
    return [*names, "g.nc"]


def test_whatever_gdal_reads_is_read(tmp_path):
    names = write_formats(tmp_path)
    for name in names:
        ((_, path, window, image, valid),) = one_by_one(GeoTiffTiles(str(tmp_path / name), tile_size=8))
        expected = PIXELS.astype(np.int8) if name == "g.nc" else PIXELS
        assert np.array_equal(
            image, expected[:, ::-1] if name == "g.nc" and not np.array_equal(image, expected) else expected
        ), name
        assert (Path(path).name, window) == (name, [0, 0, 8, 8])
        assert valid.all()
    in_folder, skipped = read(str(tmp_path))
    assert in_folder == {name for name in names if "." in name and name not in ("d.png", "f.dat")} | {"a.tif"}
    assert skipped["picture"] == 1
    assert set(skipped) == {"picture", "no raster"}
    assert read(str(tmp_path / "*.png"))[0] == {"d.png"}


def test_subdatasets_are_named(tmp_path):
    with netcdf_file(tmp_path / "a.nc", "w") as file:
        file.createDimension("y", 8)
        file.createDimension("x", 8)
        for seed, name in enumerate(("red", "nir")):
            file.createVariable(name, "i2", ("y", "x"))[:] = draw(1, 8, 8, seed=seed)[0]
    path = tmp_path / "a.nc"
    with pytest.raises(TilesError, match=r"^No window .*\(1 subdatasets; first: .*a\.nc .*: name one as netcdf:FILE:VAR"):
        read(str(path))
    for name in (f"netcdf:{path}:nir", f'NETCDF:"{path}":nir'):
        ((_, found, _, image, _),) = one_by_one(GeoTiffTiles(name, tile_size=8))
        assert found == name
        assert np.array_equal(np.sort(image, axis=None), np.sort(draw(1, 8, 8, seed=1), axis=None))


def test_a_raster_that_names_others_is_read_by_its_ending_only(tmp_path):
    write_formats(tmp_path)
    (tmp_path / "sneaky.tif").write_bytes((tmp_path / "c.vrt").read_bytes())
    (tmp_path / "sneaky").write_bytes((tmp_path / "c.vrt").read_bytes())
    assert read([str(tmp_path / name) for name in ("sneaky.tif", "sneaky", "b.img")]) == (
        {"b.img"}, {"unreadable": 1, "no raster": 1},
    )  # fmt: skip


def test_sources_of_a_virtual_raster_that_are_gone_are_damage(tmp_path):
    write_formats(tmp_path)
    (tmp_path / "source" / "a.tif").unlink()
    assert read([str(tmp_path / name) for name in ("c.vrt", "b.img")]) == ({"b.img"}, {"unreadable": 1})


VRT = (
    '<VRTDataset rasterXSize="256" rasterYSize="256"><VRTRasterBand dataType="Byte" band="1">{nodata}<SimpleSource>'
    '<SourceFilename relativeToVRT="1">{source}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>'
    "</VRTDataset>"
)


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("nodata", ["", "<NoDataValue>0</NoDataValue>"])
@pytest.mark.parametrize("source", ["gone.tif", "garbage.tif", "inner.vrt"])
def test_virtual_rasters_whose_sources_cannot_be_opened_give_no_zeros(tmp_path, source, nodata, workers):
    """Read by several threads, GDAL fails in one of them and gives zeros to the others."""
    (tmp_path / "garbage.tif").write_bytes(b"II*\0" + bytes(range(200)))
    (tmp_path / "inner.vrt").write_text(VRT.format(nodata="", source="gone.tif"))
    (tmp_path / "a.vrt").write_text(VRT.format(nodata=nodata, source=source))
    write(tmp_path / "b.tif", draw(1, 256, 256))
    (tmp_path / "c.vrt").write_text(VRT.format(nodata="", source="b.tif"))
    index = str(tmp_path / "index.json")
    for _ in range(2):  # headers of virtual rasters are not kept
        tiles = GeoTiffTiles(
            [str(tmp_path / "a.vrt"), str(tmp_path / "c.vrt")], tile_size=16, num_workers=workers, max_bad_fraction=0.5,
            index_cache=index,
        )  # fmt: skip
        assert {os.path.basename(tile[1]) for tile in one_by_one(tiles)} == {"c.vrt"}
        assert tiles.skipped == {"unreadable": 1}


def test_a_mask_beside_a_raster_is_a_tiff(tmp_path):
    """GDAL opens it as whatever it is, and a virtual raster names files and servers."""
    for name in ("a.tif", "b.tif"):
        chip(tmp_path / name)
    (tmp_path / "a.tif.msk").write_text(VRT.format(nodata="", source="/vsicurl/http://127.0.0.1:9/x.tif"))
    assert read([str(tmp_path / name) for name in ("a.tif", "b.tif")]) == ({"b.tif"}, {"unreadable": 1})


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a.zip", r"/vsizip/.*a\.zip/name\.tif"),
        ("a.tar.gz", r"/vsitar/.*a\.tar\.gz/name\.tif"),
        ("a.tif.gz", r"/vsigzip/.*a\.tif\.gz"),
    ],
)
def test_archives_are_answered_with_the_name_inside(tmp_path, name, inside):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.write(chip(tmp_path / "a.tif"), "name.tif")
    with pytest.raises(
        TilesError, match=rf"^.* is an archive, expected a raster file: name the file inside of it, as {inside}\.$"
    ):
        read(str(tmp_path / name))
    if name == "a.zip":
        assert read(f"/vsizip/{tmp_path / name}/name.tif")[0] == {"name.tif"}


def test_a_folder_of_pictures_is_answered_with_a_glob(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(
        TilesError, match=r"only .*a\.jpg \(picture\), expected .*: name pictures by a glob such as /data/\*\*/\*\.jpg\.$"
    ):
        read(str(tmp_path))
