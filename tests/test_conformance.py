"""The stream against rasterio: on files of every kind, on real ones, and proof that a broken stream is noticed."""

import json
import logging
import os

import numpy as np
import pytest
import torch

from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.errors import TilesError
from tests.conformance import Reference, Setting, conform, find, main
from tests.odd_rasters import DATED, HEIGHT, KINDS, WIDTH, write_all
from tests.rasters import draw, truncate, write

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # of writing

NEVER_LEFT_OUT = ("uint8.tif", "deflate.tif", "mask_per_band_internal.tif", "relative.vrt", "truncated_50.tif")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, write_all(folder)


# The stream


def test_files_of_every_kind(odd):
    folder, written = odd

    def select(reference, setting):
        if os.path.basename(os.path.dirname(reference.path)) == "names":
            return setting.name == "plain"
        return setting.name != "metadata" or reference.day is not None or "uint8" in reference.path

    report = conform(folder, max_windows=12, workers=0, select=select)
    assert not report.failed, str(report)
    assert report.files >= sum(path is not None for path in written.values())
    assert report.exact >= report.windows - report.doubtful > 4000
    assert report.doubtful < 20


@pytest.mark.parametrize(
    ("folder", "max_files"), [("scenes", None), ("terratorch_hls_tile", None), ("hls_water", 3), ("rsscn7", 2), ("", 8)]
)
def test_shared_data(shared_data, folder, max_files):
    report = conform(shared_data / folder, max_files, max_windows=6)
    assert not report.failed, str(report)
    assert report.exact == report.windows > 0


# The files


def test_every_kind_is_written_or_named(odd):
    folder, written = odd
    assert set(written) == set(KINDS)
    assert all(written[name] is not None for name in NEVER_LEFT_OUT)
    for name, path in written.items():
        assert path is None or path == folder / name
        assert path is None or path.is_file()


# The reference


@pytest.mark.parametrize(
    ("name", "bands", "nodata", "invalid"),
    [
        ("uint8.tif", None, None, 0),
        ("nodata.tif", None, None, 30 * WIDTH),
        ("nodata.tif", [2], None, 0),
        ("nodata.tif", None, float("nan"), 0),
        ("nan_undeclared.tif", None, None, 9 * WIDTH + 10),
        ("float64_extremes.tif", None, None, 9 * WIDTH + 2),
        ("rgba.tif", None, None, 0),
        ("rgba.tif", [4, 1], None, 0),
        ("rgba.tif", [1], None, 30 * WIDTH),
        ("rgba_nir.tif", [1], None, 0),
        ("mask_internal.tif", None, None, 1830),
        ("mask_sidecar.tif", [2], float("nan"), 1830),
        ("mask_per_band_sidecar.tif", [2], None, 1830),
        ("mask_per_band_internal.tif", [2], None, 1830),
        ("nodata_values.tif", [1], None, 30 * WIDTH),
        ("nodata_values.tif", [1], 250, 0),
        ("nodata_neighbours_minus_9999.tif", None, None, 10),
        ("nodata_neighbours_minus_9999.tif", None, -9999, 10),
        ("nodata_neighbours_0.tif", None, 0, 2),
        ("nodata_int64_large.tif", None, None, WIDTH),
        ("nodata_int64_large.tif", None, 2**62 + 1, WIDTH),
        ("nodata_uint8_minus_9999.tif", None, -9999, 0),
        ("nodata_fraction.tif", None, 0.5, 0),
    ],
)
def test_reference_knows_which_pixels_are_valid(odd, name, bands, nodata, invalid):
    reference = Reference(str(odd[0] / name))
    setting = Setting("", 8, 8, bands, nodata, max_nodata_fraction=1.0)
    assert np.count_nonzero(~reference.read((0, 0, WIDTH, HEIGHT), setting).valid) == invalid


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.tif", "empty file"),
        ("text.tif", "unreadable"),
        ("complex64.tif", "complex numbers"),
        ("several_variables.nc", "subdatasets"),
        (os.fsdecode(b"names/caf\xe9.tif"), "name is not UTF-8"),
    ],
)
def test_reference_knows_why_a_file_cannot_be_read(odd, name, reason):
    if odd[1][name] is None:
        pytest.skip(f"{name!a} cannot be written here")
    assert reason in Reference(str(odd[0] / name)).reasons


def test_reference_does_not_trust_a_file_after_an_error(odd, caplog):
    """GDAL reads the rest of a truncated picture without an error, once one was raised."""
    caplog.set_level(logging.CRITICAL, "rasterio")
    for name in ("truncated.png", "truncated.jpg", "truncated_50.tif"):
        reference = Reference(str(odd[0] / name))
        setting = Setting("", 24, 24)
        lowest = reference.windows(setting)[-1]
        assert reference.read(lowest, setting).reasons == {"unreadable"}


def test_reference_reads_masks_beside_files_whatever_is_set(odd, monkeypatch):
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")  # as TerraTorch's command line does
    for name in ("mask_sidecar.tif", "mask_per_band_sidecar.tif"):
        reference = Reference(str(odd[0] / name))
        assert np.count_nonzero(~reference.read((0, 0, WIDTH, HEIGHT), Setting("", 8, 8, max_nodata_fraction=1.0)).valid) > 0


def test_reference_tells_when_rasterio_contradicts_itself(tmp_path):
    path = write(tmp_path / "a.tif", draw(1, 32, 32))
    reference, setting = Reference(str(path)), Setting("", 32, 32)
    (window,) = reference.windows(setting)
    assert reference.read(window, setting).valid.all()
    assert not reference.contradicts_itself(window, setting)
    write(path, draw(1, 32, 32, seed=1))
    assert reference.contradicts_itself(window, setting)
    truncate(path)
    assert reference.contradicts_itself(window, setting)


# A broken stream is noticed


@pytest.fixture
def sound(tmp_path):
    """Two files with gaps, a mask, a date and a place, and something that is no raster."""
    mask = np.full((72, 96), 255, "uint8")
    mask[20:30, 20:30] = 0
    for number in range(2):
        write(tmp_path / f"{number}.tif", draw(2, 72, 96, seed=number), mask=mask, tags=DATED)
    return tmp_path


def broken(change, folders=False):
    """A stream whose list of batches is changed, of files or of folders."""

    class Broken(GeoTiffTiles):
        def __init__(self, paths, **arguments):
            super().__init__(paths, **arguments)
            self.broken = os.path.isdir(paths) == folders

        def __iter__(self):
            batches = list(super().__iter__())
            changed = change(batches) if self.broken else None
            yield from batches if changed is None else changed

    return Broken


def take_out(batches, number=0):
    for key, values in batches[0].items():
        batches[0][key] = [value for at, value in enumerate(values) if at != number]


def set_value(key, where, value):
    def change(batches):
        batches[0][key][where] = value

    return change


def add(key, where, amount):
    def change(batches):
        batches[0][key][where] += amount

    return change


def at_a_gap(batches):
    valid = batches[0]["valid"]
    tile, row, column = (~valid).nonzero()[0].tolist()
    batches[0]["image"][tile, 1, row, column] = float("nan")


def of_a_gap(batches):
    valid = batches[0]["valid"]
    valid[tuple((~valid).nonzero()[0])] = True


def of_a_known_pixel(batches):
    valid = batches[0]["valid"]
    valid[tuple(valid.nonzero()[0])] = False


def a_stored_value(batches):
    tile, row, column = batches[0]["valid"].nonzero()[-1].tolist()
    image = batches[0]["image"]
    image[tile, 0, row, column] = torch.nextafter(image[tile, 0, row, column], torch.tensor(1e9))


def raise_error(_):
    raise ValueError("broken")


def refuse(_):
    raise TilesError("No window, expected at least one: check paths.")


@pytest.mark.parametrize(
    ("change", "setting", "kind", "message"),
    [
        (a_stored_value, "plain", "wrong", "such values"),
        (lambda batches: set_value("image", 0, batches[0]["image"][0].flip(0))(batches), "plain", "wrong", "such values"),
        (lambda batches: set_value("image", 0, batches[0]["image"][0].mT.clone())(batches), "plain", "wrong", "such values"),
        (of_a_gap, "overlap", "wrong", "valid True"),
        (of_a_known_pixel, "overlap", "wrong", "valid False"),
        (at_a_gap, "overlap", "wrong", "expected finite values"),
        (lambda batches: take_out(batches), "plain", "uncounted", "neither delivered nor counted"),
        (lambda batches: [*batches, batches[0]], "plain", "wrong", "delivered 2 times"),
        (add("window", (0, 0), 1), "plain", "wrong", "no window of the grid"),
        (lambda _: [], "plain", "uncounted", "neither delivered nor counted"),
        (raise_error, "plain", "crashed", "ValueError: broken"),
        (refuse, "plain", "crashed", "No window, expected"),
        (add("image", (0, 0), 0.01), "statistics", "wrong", "such values"),
        (add("location_coords", (0, 0), 0.01), "metadata", "wrong", "location_coords"),
        (add("location_coords", (0, 1), 360), "metadata", "wrong", "at most 90 and 180"),
        (add("temporal_coords", (0, 0, 1), 1), "metadata", "wrong", "temporal_coords"),
        (set_value("valid", (0, -1), True), "padded", "wrong", "valid True"),
        (add("image", (0, 0, -1), 1), "padded", "wrong", "added pixels"),
    ],
)
def test_broken_stream(sound, change, setting, kind, message):
    report = conform(sound, workers=0, select=lambda _, chosen: chosen.name == setting, make=broken(change))
    assert report.failed
    assert kind in {found["kind"] for found in report.differences}
    assert {os.path.basename(found["path"]) for found in report.differences} == {"0.tif", "1.tif"}
    assert any(message in found["what"] and found["setting"] == setting for found in report.differences)
    assert getattr(report, kind) >= 2
    assert message in str(report)


def test_broken_count(sound):
    class Miscounting(GeoTiffTiles):
        more: dict = {}  # noqa: RUF012

        @property
        def skipped(self):
            return {**super().skipped, **self.more}

    def differences(**more):
        make = type("Miscounting", (Miscounting,), {"more": more})
        return conform(sound, select=lambda _, chosen: chosen.name == "first band", make=make).differences

    assert not differences()
    assert any("skipped" in found["what"] for found in differences(nodata=3))
    assert any("skipped" in found["what"] for found in differences(unreadable=1))
    assert any("known reasons" in found["what"] for found in differences(broken=1))


def test_broken_reading_of_folders(sound):
    def report(change):
        return conform(sound, select=lambda *_: False, make=broken(change, folders=True))

    def leave_out_a_file(batches):
        for batch in batches:
            kept = [number for number, path in enumerate(batch["path"]) if not path.endswith("1.tif")]
            for key, values in batch.items():
                batch[key] = [values[number] for number in kept]

    (found,) = [found for found in report(leave_out_a_file).differences if found["setting"] == "folder"][:1]
    assert found["kind"] == "uncounted"
    assert "1.tif" in found["what"]
    assert report(lambda batches: [*batches, batches[0]]).wrong
    assert report(a_stored_value).wrong == 1
    assert report(raise_error).crashed == 1
    assert not conform(sound, select=lambda *_: False).failed


def test_every_file_of_a_folder_must_be_counted(sound):
    (sound / "notes.md").write_text("notes")
    (sound / ".hidden").write_text("x")

    def report(**counted):
        class OfAFolder(GeoTiffTiles):
            def __init__(self, paths, **arguments):
                super().__init__([str(sound / "0.tif"), str(sound / "1.tif")], **arguments)

            @property
            def skipped(self):
                return {**super().skipped, **counted}

        return conform(sound, select=lambda *_: False, make=OfAFolder)

    assert not report(hidden=1, **{"no raster": 1}).failed
    assert report(hidden=1).uncounted == 1
    assert report().uncounted == 2
    assert report(hidden=2, **{"no raster": 1}).wrong == 1
    (sound / "link").symlink_to(sound / "0.tif")
    assert not report(hidden=1, **{"no raster": 1, "same file": 1}).failed


def test_what_is_delivered_must_be_readable(sound):
    """A stream that fills in what it cannot read."""
    damaged, whole = sound / "0.tif", sound / "whole"
    write(whole, draw(2, 72, 96))
    damaged.write_bytes(whole.read_bytes())
    truncate(damaged, 0.6)

    class Lenient(GeoTiffTiles):
        def __init__(self, paths, **arguments):
            super().__init__(whole if paths == str(damaged) else paths, **arguments)

        def __iter__(self):
            for batch in super().__iter__():
                yield {**batch, "path": [path.replace(str(whole), str(damaged)) for path in batch["path"]]}

    report = conform(sound, select=lambda _, chosen: chosen.name == "plain", make=Lenient)
    found = [found for found in report.differences if found["path"] == str(damaged)]
    assert any("expected to be skipped as unreadable" in one["what"] for one in found)


# The command line


def test_command_line(sound, capsys, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report.json"
    assert main([str(sound), "--json", str(out)]) == 0
    rows = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    report = json.loads(out.read_text())
    assert rows["files"] == "2"
    assert int(rows["exact"]) == int(rows["windows compared"]) == report["exact"] > 20
    assert rows["wrong"] == rows["crashed"] == rows["uncounted"] == "0"
    assert rows["skipped: nodata"] == str(report["skipped"]["nodata"])
    assert (report["failed"], report["differences"]) == (False, [])
    assert main([str(sound), "--max_files", "1"]) == 0
    assert "1 files and the folder as a whole left out (max_files)" in capsys.readouterr().out


def test_command_line_tells_what_differs(sound, capsys, monkeypatch, tmp_path_factory):
    stream = GeoTiffTiles.__iter__

    def change(tiles):
        for batch in stream(tiles):
            batch["image"] += 1
            yield batch

    monkeypatch.setattr(GeoTiffTiles, "__iter__", change)
    out = tmp_path_factory.mktemp("out") / "report.json"
    assert main([str(sound), "--json", str(out)]) == 1
    text = capsys.readouterr().out
    assert f"wrong: '{sound}/0.tif' [plain] window (" in text
    assert "differences in 2 files" in text
    assert json.loads(out.read_text())["wrong"] > 20


def test_command_line_without_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none")])
    assert "is not a folder" in capsys.readouterr().err


def test_regular_files_are_found(sound):
    (sound / "sub" / ".hidden").mkdir(parents=True)
    (sound / "sub" / ".hidden" / "x").write_text("x")
    (sound / "link").symlink_to(sound / "0.tif")
    (sound / "loop").symlink_to(sound)
    os.mkfifo(sound / "pipe")
    files, others = find(str(sound))
    assert [os.path.relpath(path, sound) for path in files] == ["0.tif", "1.tif", "sub/.hidden/x"]
    assert others == 3
