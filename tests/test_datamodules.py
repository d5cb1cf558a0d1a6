"""A row for every datamodule class of the installed TerraTorch: streamed as its dataset reads it, or refused."""

import copy
import os
import random

import numpy as np
import pytest
import terratorch.datamodules
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Subset

from terratorch_simpler import SlimmingPlan
from terratorch_simpler.data import DatamoduleTiles
from terratorch_simpler.data.source import file_stat
from terratorch_simpler.demo.scenes import write_scenes
from terratorch_simpler.errors import ConfigurationError
from tests import datamodules
from tests.cli_runner import Command, config
from tests.datamodules import DRAWN, MISSING, NOT_SET_UP, REFUSED, STREAMED
from tests.installed import shipped_classes

pytestmark = [
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning:rioxarray"),
    pytest.mark.filterwarnings("ignore:expand_temporal_dimension"),
    pytest.mark.filterwarnings("ignore:Argument\\(s\\) 'value':UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_there_is_a_row_for_every_class_that_is_installed():
    found, missing = shipped_classes(terratorch.datamodules, LightningDataModule, "DataModule")
    refused = {name for name in REFUSED if name.endswith("DataModule")}
    streamed = {name.partition(" of ")[0] for name in STREAMED}
    assert found == streamed | refused | NOT_SET_UP.keys() | (MISSING.keys() - missing)
    assert missing <= MISSING.keys()


@pytest.fixture
def made(tmp_path, monkeypatch):
    def make(name):
        if name == "Sen4MapLucasDataModule":
            # TerraTorch 1.2.11 compares an HDF5 dataset with a number, which h5py does not do.
            monkeypatch.setattr("h5py.Dataset.__lt__", lambda self, other: self[()] < other, raising=False)
        datamodule = STREAMED[name][0](tmp_path)
        datamodule.setup("fit")
        return datamodule

    return make


def own_samples(datamodule):
    """The dataset that trains, with the transform of the one that evaluates."""
    loader = datamodule.train_dataloader()
    own = copy.copy(getattr(datamodule, "train_dataset", None) or loader.dataset)
    for name in ("transform", "transforms"):
        if getattr(datamodule, "val_dataset", None) is not None and hasattr(own, name):
            setattr(own, name, getattr(datamodule.val_dataset, name))
    return own


def parts(image):
    return image if isinstance(image, dict) else {"image": image}


@pytest.mark.parametrize("name", STREAMED)
def test_images_are_those_of_its_own_dataset(name, made):
    _, count, gap = STREAMED[name]
    datamodule = made(name)
    tiles = DatamoduleTiles(datamodule)
    batches = list(tiles)
    assert len(tiles) == count
    assert sorted(index for batch in batches for index in batch["index"]) == list(range(count))
    assert tiles.skipped == {}
    own = own_samples(datamodule)
    lacking = {}
    for batch in batches:
        assert not batch.keys() & {"mask", "label", "labels", "boxes", "masks", "target"}
        for row, index in enumerate(batch["index"]):
            valid = batch["valid"][row]
            if not valid.all():
                lacking[index] = int((~valid).sum())
            image = {part: pixels[row] for part, pixels in parts(batch["image"]).items()}
            assert all(torch.isfinite(pixels).all() for pixels in image.values() if pixels.is_floating_point())
            if name in DRAWN:
                continue
            if name in ("TorchNonGeoDataModule", "TilingDataModuleWrapper"):
                expected = {"image": untouched(name, datamodule, index)}
            else:
                expected = parts(own[index]["image"])
            assert image.keys() == expected.keys()
            for part, pixels in image.items():
                assert torch.equal(pixels, torch.as_tensor(expected[part])), (index, part)
    assert sum(lacking.values()) == gap
    assert lacking.keys() <= {0}


def untouched(name, datamodule, index):
    """Where the transform of training is that of evaluation as well, or is kept in a cache."""
    if name == "TorchNonGeoDataModule":
        return datamodules.Fields()[index]["image"]
    base = copy.copy(datamodule.base_dm.train_dataset)
    base.transform = datamodule.base_dm.val_dataset.transform
    image = base[index // 4]["image"]
    row, column = 12 * (index % 4 // 2), 12 * (index % 2)
    return image[:, row : row + 12, column : column + 12]


@pytest.mark.parametrize("name", STREAMED)
def test_every_pass_is_the_same_and_the_random_state_is_the_users(name, made):
    datamodule = made(name)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    tiles = DatamoduleTiles(datamodule)
    first, second = list(tiles), list(tiles)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    for one, other in zip(first, second, strict=True):
        assert one["index"] == other["index"]
        for part, pixels in parts(one["image"]).items():
            assert torch.equal(pixels, parts(other["image"])[part])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_stream_is_refused_in_a_sentence(kind, tmp_path):
    make, expected = REFUSED[kind]
    datamodule = make(tmp_path)
    datamodule.setup("fit")
    with pytest.raises(ConfigurationError, match=f"^{expected}.*: give the callback tiles.*\\.$"):
        DatamoduleTiles(datamodule)


@pytest.mark.parametrize("name", NOT_SET_UP)
def test_what_terratorch_itself_cannot_set_up(name, tmp_path):
    """Goes red when it can, and asks for a row among the others."""
    make, error, expected = NOT_SET_UP[name]
    with pytest.raises(error, match=expected):
        make(tmp_path).setup("fit")


def test_parts_of_one_file_are_told_apart(tmp_path):
    """As images in a TACO file are, which GDAL reads by where they begin."""
    (tmp_path / "data.tacozip").write_bytes(b"0123456789")
    first, second = (file_stat(f"/vsisubfile/{start}_5,{tmp_path / 'data.tacozip'}") for start in (0, 5))
    assert (first.name, second.name) == ("/vsisubfile/0_5,data.tacozip", "/vsisubfile/5_5,data.tacozip")
    whole = file_stat(tmp_path / "data.tacozip")
    assert first[1:] == second[1:] == whole[1:]
    assert whole.size == 10


def test_tiles_of_one_image_are_of_one_file(made):
    """The verdict takes what is of one file as one place."""
    tiles = DatamoduleTiles(made("TilingDataModuleWrapper"))
    paths = [path for batch in tiles for path in batch["path"]]
    assert len(paths) == len(tiles)
    assert 1 < len(set(paths)) < len(paths)
    assert all(os.path.isfile(path) for path in paths)


def test_tiling_leaves_its_cache_alone(made, tmp_path):
    list(DatamoduleTiles(made("TilingDataModuleWrapper")))
    assert not list((tmp_path / "cache").rglob("*.pt"))


@pytest.mark.parametrize("wrapped", ["subset", "concatenated"])
@pytest.mark.parametrize("name", ["GenericNonGeoSegmentationDataModule", "FireScarsNonGeoDataModule"])
def test_parts_and_sums_of_datasets(name, made, wrapped):
    datamodule = made(name)
    own = own_samples(datamodule)
    dataset = datamodule.train_dataset
    datamodule.train_dataset = Subset(dataset, [0, 3]) if wrapped == "subset" else dataset + dataset
    tiles = DatamoduleTiles(datamodule)
    found = {i: pixels for batch in tiles for i, pixels in zip(batch["index"], batch["image"], strict=True)}
    numbers = [0, 3] if wrapped == "subset" else [*range(datamodules.COUNT)] * 2
    assert sorted(found) == list(range(len(numbers)))
    for index, number in enumerate(numbers):
        assert torch.equal(found[index], own[number]["image"])


@pytest.mark.parametrize("name", ["fire scars", "no images"])
def test_fit_on_the_command_line(name, tmp_path):
    """A real run on 40 pairs that TerraTorch's dataset reads with their labels only, and one that finds nothing."""
    settings = config(tmp_path, tmp_path / "run")
    if name == "fire scars":
        for split, count in (("training", 40), ("validation", 4)):
            for number in range(count):
                datamodules.raster(tmp_path / split / f"a{number}_merged.tif", 6, number, gap=number == 0)
                datamodules.labels(tmp_path / split / f"a{number}.mask.tif", number)
        arguments = {"data_root": str(tmp_path), "batch_size": 4}
        settings["data"] = {"class_path": "terratorch.datamodules.FireScarsNonGeoDataModule", "init_args": arguments}
        settings["model"]["init_args"]["model_args"]["num_classes"] = 2
    else:
        write_scenes(tmp_path, {"train": 4, "val": 2, "test": 2}, size=32)
        settings["data"]["init_args"]["img_grep"] = "*_picture.tif"
    command = Command(tmp_path / "run", settings, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2")
    code = command.wait()
    if name == "fire scars":
        assert code == [0], command.output()
        plan = SlimmingPlan.load(tmp_path / "run" / "simpler" / "plan.json")
        assert plan.tiles_seen == 40
        assert plan.data["skipped"] == {}
        assert "FireScarsNonGeo reads no image without its label: labels are read and dropped." in command.output()
    else:
        assert code == [1]
        said = command.output()
        for part in (
            "No training images in GenericNonGeo",
            f"data root {tmp_path}",
            "glob *_picture.tif",
            "train.txt",
        ):
            assert part in said
