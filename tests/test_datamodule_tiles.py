"""The datamodule's training images: every one once, without masks or augmentation, and the datamodule left as it was."""

import copy
import random
import shutil
from pathlib import Path

import albumentations
import kornia.augmentation
import numpy as np
import pytest
import rasterio
import torch
import torchvision.transforms.v2
from albumentations.pytorch import ToTensorV2
from lightning.pytorch import LightningDataModule
from terratorch.datamodules import (
    GenericMultiModalDataModule,
    GenericNonGeoClassificationDataModule,
    GenericNonGeoSegmentationDataModule,
)
from torch.utils.data import DataLoader, Dataset, Subset

from terratorch_simpler.data import DatamoduleTiles
from terratorch_simpler.demo.scenes import NODATA, write_scenes
from terratorch_simpler.errors import ConfigurationError, TilesError
from tests import layouts

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning:rioxarray")

COUNT, SIZE = 12, 64
GAP = (slice(None), slice(0, 5), slice(3, 9))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Scenes without a gap; where the generator leaves one it is filled."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, {"train": COUNT, "val": 2, "test": 2}, size=SIZE)
    for path in (folder / "images").iterdir():
        change(path, lambda pixels: np.where(pixels == NODATA, 1, pixels))
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(originals, tmp_path / "scenes")


def change(path, function):
    with rasterio.open(path, "r+") as file:
        file.write(function(file.read()).astype(file.dtypes[0]))


def cut_out(where=...):
    def with_gap(pixels):
        pixels[where] = NODATA
        return pixels

    return with_gap


def image_path(folder, number):
    return folder / "images" / f"scene_{number:04d}_image.tif"


def pixels_of(path):
    with rasterio.open(path) as file:
        return file.read()


def crop(path, size):
    """Cut a scene to a smaller size."""
    with rasterio.open(path) as file:
        profile, pixels = file.profile, file.read()
    with rasterio.open(path, "w", **{**profile, "width": size, "height": size}) as file:
        file.write(pixels[:, :size, :size])


def segmentation(folder, **kwargs):
    splits = {
        f"{split}_{key}": folder / place
        for split in ("train", "val", "test")
        for key, place in (("data_root", "images"), ("label_data_root", "masks"), ("split", f"splits/{split}.txt"))
    }
    defaults = {"batch_size": 5, "num_workers": 0, "num_classes": 6, "img_grep": "*_image.tif", "label_grep": "*_mask.tif"}
    datamodule = GenericNonGeoSegmentationDataModule(**{**defaults, **splits, **kwargs})
    datamodule.setup("fit")
    return datamodule


def one_by_one(tiles):
    return [tile for batch in tiles for tile in zip(batch["index"], batch["image"], batch["valid"], strict=True)]


def order(tiles):
    return [tile[0] for tile in one_by_one(tiles)]


# Every image once, as it is in the file


def test_every_training_image_once(folder):
    tiles = DatamoduleTiles(segmentation(folder))
    batches = list(tiles)
    assert [len(batch["index"]) for batch in batches] == [5, 5, 2]
    assert len(tiles) == COUNT
    for batch in batches:
        assert set(batch) == {"image", "valid", "index", "position", "path"}
        assert batch["path"] == [tiles.name_of(number) for number in batch["index"]]
        assert batch["image"].dtype == torch.float32
        assert (batch["valid"].dtype, batch["valid"].shape) == (torch.bool, (len(batch["index"]), SIZE, SIZE))
    found = one_by_one(batches)
    assert sorted(tile[0] for tile in found) == list(range(COUNT))
    for number, image, valid in found:
        assert np.array_equal(image, pixels_of(image_path(folder, number)))
        assert valid.all()
    assert tiles.skipped == {}


def test_second_pass_repeats_the_first(folder):
    tiles = DatamoduleTiles(segmentation(folder))
    assert order(tiles) == order(tiles)


@pytest.mark.parametrize("damage", ["garbage", "gone"])
def test_masks_are_not_read(folder, damage):
    datamodule = segmentation(folder)
    for path in (folder / "masks").iterdir():
        path.write_text("garbage") if damage == "garbage" else path.unlink()
    with pytest.raises(rasterio.errors.RasterioIOError):
        datamodule.train_dataset[0]
    assert len(one_by_one(DatamoduleTiles(datamodule))) == COUNT


@pytest.mark.parametrize("evaluation", [None, [ToTensorV2()]])
def test_augmentation_is_not_applied(folder, evaluation):
    train = [albumentations.RandomCrop(16, 16), albumentations.HorizontalFlip(p=1.0), ToTensorV2()]
    datamodule = segmentation(folder, train_transform=train, test_transform=evaluation)
    assert datamodule.train_dataset[0]["image"].shape == (6, 16, 16)
    for number, image, _ in one_by_one(DatamoduleTiles(datamodule)):
        assert np.array_equal(image, pixels_of(image_path(folder, number)))


def test_transform_of_evaluation_is_applied(folder):
    resize = [albumentations.Resize(32, 32), ToTensorV2()]
    for name in ("test_transform", "val_transform"):
        found = one_by_one(DatamoduleTiles(segmentation(folder, **{name: resize})))
        assert {(image.shape, valid.shape) for _, image, valid in found} == {((6, 32, 32), (32, 32))}


def test_bands_and_scale_of_the_datamodule(folder):
    bands = {"dataset_bands": [1, 2, 3, 4, 5, 6], "output_bands": [4, 1], "constant_scale": 0.5}
    for number, image, _ in one_by_one(DatamoduleTiles(segmentation(folder, **bands))):
        assert np.array_equal(image, pixels_of(image_path(folder, number))[[3, 0]] * np.float32(0.5))


def test_time_series(folder):
    bands = {"dataset_bands": [1, 2, 3], "output_bands": [1, 2, 3], "expand_temporal_dimension": True, "no_data_replace": 0}
    change(image_path(folder, 4), cut_out((slice(3, 4), *GAP[1:])))
    for number, image, valid in one_by_one(DatamoduleTiles(segmentation(folder, **bands))):
        expected = pixels_of(image_path(folder, number)).reshape(2, 3, SIZE, SIZE).swapaxes(0, 1)
        assert np.array_equal(image, np.where(expected == NODATA, 0, expected))
        assert np.array_equal(valid, (expected != NODATA).all(axis=0))
        assert valid.shape == (2, SIZE, SIZE)
        assert valid[0].all()
        assert bool(valid[1].all()) == (number != 4)


def test_datamodule_stays_as_it_was(folder):
    datamodule = segmentation(folder, no_data_replace=0, train_transform=[albumentations.D4(), ToTensorV2()])
    dataset = datamodule.train_dataset
    # Lists are copied, to notice a change in place; the transform has no equality but its own.
    before = {name: copy.copy(value) if isinstance(value, list) else value for name, value in vars(dataset).items()}
    module = dict(vars(datamodule))
    list(DatamoduleTiles(datamodule))
    assert vars(dataset) == before
    assert vars(datamodule) == module
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["mask"].shape == (5, SIZE, SIZE)


# Order


@pytest.mark.parametrize("workers", [0, 2])
def test_order_depends_on_the_seed_only(folder, workers):
    expected = order(DatamoduleTiles(segmentation(folder), seed=3))
    assert expected != sorted(expected)
    torch.manual_seed(99)
    assert order(DatamoduleTiles(segmentation(folder, num_workers=workers, batch_size=2), seed=3)) == expected
    other = order(DatamoduleTiles(segmentation(folder, num_workers=workers), seed=4))
    assert other != expected
    assert sorted(other) == sorted(expected)


def test_fingerprint_follows_files_and_seed(folder):
    first = DatamoduleTiles(segmentation(folder)).describe()
    assert first == DatamoduleTiles(segmentation(folder, num_workers=2, batch_size=1)).describe()
    assert first["source"] == "GenericNonGeoSegmentationDataModule"
    assert first["tiles"] == COUNT
    assert first != DatamoduleTiles(segmentation(folder), seed=1).describe()
    crop(image_path(folder, 2), 32)
    assert first != DatamoduleTiles(segmentation(folder)).describe()


# Missing data and damage


@pytest.mark.parametrize("workers", [0, 2])
def test_replaced_nodata_is_not_valid(folder, workers):
    change(image_path(folder, 4), cut_out((slice(2, 3), *GAP[1:])))
    tiles = DatamoduleTiles(segmentation(folder, no_data_replace=-7, num_workers=workers))
    found = {number: (image.numpy(), valid.numpy()) for number, image, valid in one_by_one(tiles)}
    assert sorted(found) == list(range(COUNT))
    image, valid = found.pop(4)
    expected = pixels_of(image_path(folder, 4))
    assert np.array_equal(~valid, expected[2] == NODATA)
    assert (~valid).sum() == 30
    assert np.array_equal(image, np.where(expected == NODATA, -7, expected))
    assert all(valid.all() for _, valid in found.values())
    assert tiles.skipped == {}


def test_nodata_of_a_subset_is_not_valid(folder):
    change(image_path(folder, 4), cut_out(GAP))
    datamodule = segmentation(folder, no_data_replace=0)
    datamodule.train_dataset = Subset(datamodule.train_dataset, [4, 6])
    tiles = DatamoduleTiles(datamodule)
    found = {number: valid for number, _, valid in one_by_one(tiles)}
    assert {number: int((~valid).sum()) for number, valid in found.items()} == {0: 30, 1: 0}
    assert len(tiles) == 2
    image_path(folder, 6).write_text("garbage")
    with pytest.raises(TilesError, match=r"scene_0006_image\.tif"):
        list(tiles)


def test_tile_with_nan_is_skipped_without_a_replacement(folder):
    change(image_path(folder, 4), cut_out(GAP))
    tiles = DatamoduleTiles(segmentation(folder))
    assert sorted(order(tiles)) == [number for number in range(COUNT) if number != 4]
    assert tiles.skipped == {"NaN without no_data_replace": 1}
    assert str(image_path(folder, 4)) in str(tiles.skips)


@pytest.mark.parametrize("replacement", [None, 0])
def test_tiles_without_any_data_are_skipped_and_no_damage(folder, replacement):
    for number in range(5):
        change(image_path(folder, number), cut_out())
    tiles = DatamoduleTiles(segmentation(folder, no_data_replace=replacement))
    assert sorted(order(tiles)) == list(range(5, COUNT))
    assert tiles.skipped == {"nodata": 5}
    assert str(tiles.skips).startswith("5 nodata; first: ")
    assert len(one_by_one(tiles)) == COUNT - 5  # counted anew in every pass
    assert tiles.skipped == {"nodata": 5}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["garbage", "cut", "gone"])
def test_unreadable_raster_is_skipped_counted_and_named(folder, damage, workers):
    datamodule, path = segmentation(folder, num_workers=workers), image_path(folder, 7)
    data = {"garbage": b"not a raster", "cut": path.read_bytes()[:3000], "gone": b""}[damage]
    path.unlink() if damage == "gone" else path.write_bytes(data)
    tiles = DatamoduleTiles(datamodule)
    assert sorted(order(tiles)) == [number for number in range(COUNT) if number != 7]
    assert tiles.skipped == {"unreadable": 1}
    assert str(path) in str(tiles.skips)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_rasters_are_an_error_that_names_them(folder, workers):
    change(image_path(folder, 3), cut_out())
    for number in (7, 9):
        image_path(folder, number).write_text("garbage")
    tiles = DatamoduleTiles(segmentation(folder, num_workers=workers))
    with pytest.raises(
        TilesError, match=r"2 of 12 tiles are unreadable, expected at most 10% .*: repair or remove"
    ) as error:
        list(tiles)
    for number, named in ((7, True), (9, True), (3, False)):
        assert (str(image_path(folder, number)) in str(error.value)) == named


# Tiles of unequal size


@pytest.mark.parametrize("workers", [0, 2])
def test_unequal_sizes_come_in_batches_of_their_own_in_order(folder, workers):
    expected = order(DatamoduleTiles(segmentation(folder)))
    for number in range(0, COUNT, 3):
        crop(image_path(folder, number), 32)
    batches = list(DatamoduleTiles(segmentation(folder, num_workers=workers)))
    assert [number for batch in batches for number in batch["index"]] == expected
    for batch in batches:
        size = 32 if batch["index"][0] % 3 == 0 else SIZE
        assert batch["image"].shape == (len(batch["index"]), 6, size, size)
        assert batch["valid"].shape == (len(batch["index"]), size, size)
    assert len(batches) < COUNT


# Other datamodules


def test_datamodule_without_training_images_is_refused(folder):
    datamodule = segmentation(folder)
    datamodule.train_dataset = None
    with pytest.raises(ConfigurationError, match=r"No train_dataset in GenericNonGeoSegmentationDataModule, expected one"):
        DatamoduleTiles(datamodule)


@pytest.fixture
def classes(folder, tmp_path):
    """The scenes sorted into folders of two classes."""
    root = tmp_path / "classes"
    for number in range(COUNT):
        place = root / ("dry", "wet")[number // 6]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_path(folder, number), place / f"{number:02d}.tif")
    return root


def classification(root, **kwargs):
    roots = {f"{split}_data_root": root for split in ("train", "val", "test")}
    normal = {"means": [0.0] * 6, "stds": [1.0] * 6}
    datamodule = GenericNonGeoClassificationDataModule(
        **{"batch_size": 5, "num_workers": 0, "num_classes": 2, **roots, **normal, **kwargs}
    )
    datamodule.setup("fit")
    return datamodule


def test_classification_streams_images_without_labels(classes):
    train = [albumentations.RandomCrop(16, 16), ToTensorV2()]
    datamodule = classification(classes, train_transform=train, check_stackability=False)
    tiles = DatamoduleTiles(datamodule)
    batches = list(tiles)
    assert {key for batch in batches for key in batch} == {"image", "valid", "index", "position", "path"}
    found = one_by_one(batches)
    assert sorted(tile[0] for tile in found) == list(range(COUNT))
    for number, image, _ in found:
        assert np.array_equal(image, pixels_of(classes / ("dry", "wet")[number // 6] / f"{number:02d}.tif"))
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["image"].shape == (5, 6, 16, 16)
    assert batch["label"].shape == (5,)


@pytest.mark.parametrize("damage", ["garbage", "text", "cut", "cut short", "empty"])
def test_damaged_image_of_a_class_is_skipped_counted_and_named(classes, damage):
    # TerraTorch reads these with PIL and tifffile, which raise errors of many types or return an empty array.
    path = classes / "wet" / "07.tif"
    data = path.read_bytes()
    damaged = {"garbage": b"II*\0" + b"\7" * 500, "text": b"not a raster", "cut": data[:3000], "cut short": data[:6]}
    path.write_bytes(damaged.get(damage, b""))
    tiles = DatamoduleTiles(classification(classes))
    assert sorted(order(tiles)) == [number for number in range(COUNT) if number != 7]
    assert tiles.skipped == {"unreadable": 1}
    assert str(path) in str(tiles.skips)


def test_real_tiles(shared_data):
    root = shared_data / "hls_water"
    places = {"train_data_root": root / "images", "train_label_data_root": root / "water_mask"}
    datamodule = GenericNonGeoSegmentationDataModule(
        batch_size=16, num_workers=0, num_classes=2, img_grep="*_image.tif", label_grep="*_mask.tif",
        train_split=root / "splits" / "train.txt", val_data_root=root / "images", **places,
    )  # fmt: skip
    datamodule.setup("fit")
    found = one_by_one(DatamoduleTiles(datamodule))
    assert sorted(tile[0] for tile in found) == list(range(136))
    files = [Path(file) for file in datamodule.train_dataset.image_files]
    for number, image, _ in found[:5]:
        assert np.array_equal(image, pixels_of(files[number]))


# --- modalities


@pytest.fixture
def modalities(shared_data, tmp_path):
    """Real Sentinel-2 and Sentinel-1 chips of TerraMind, with a datamodule that augments."""
    layouts.land_cover(tmp_path, shared_data)
    root = tmp_path / "land_cover"

    def make(**kwargs):
        roots = {
            f"{split}_data_root": {name: str(root / split / name) for name in ("S2L2A", "S1RTC")}
            for split in ("train", "val")
        }
        labels = {f"{split}_label_data_root": str(root / split / "LULC") for split in ("train", "val")}
        datamodule = GenericMultiModalDataModule(
            batch_size=8, num_classes=10, modalities=["S2L2A", "S1RTC"],
            image_grep={"S2L2A": "*_S2L2A.tif", "S1RTC": "*_S1RTC.tif"},
            means={"S2L2A": [0.0] * 12, "S1RTC": [0.0] * 2}, stds={"S2L2A": [1.0] * 12, "S1RTC": [1.0] * 2},
            no_data_replace=0, **{"task": "segmentation", "label_grep": "*_LULC.tif", **roots, **labels, **kwargs},
        )  # fmt: skip
        datamodule.setup("fit")
        return datamodule

    return root, make


def flips():
    return [albumentations.HorizontalFlip(p=1.0), ToTensorV2()]


@pytest.mark.parametrize("transform", [flips(), {"S2L2A": flips(), "S1RTC": flips()}], ids=["shared", "each its own"])
def test_modalities_come_without_masks_and_augmentation(modalities, transform):
    root, make = modalities
    datamodule = make(train_transform=transform)
    before = copy.deepcopy(datamodule.train_dataset.samples)
    shutil.rmtree(root / "train" / "LULC")  # the masks are not read
    tiles = DatamoduleTiles(datamodule)
    seen = {}
    for batch in tiles:
        assert batch.keys() == {"image", "valid", "index", "position", "path"}
        assert batch["path"] == [tiles.name_of(number) for number in batch["index"]]
        assert batch["valid"].shape == (len(batch["index"]), 48, 48)
        for index, optical, radar in zip(batch["index"], batch["image"]["S2L2A"], batch["image"]["S1RTC"], strict=True):
            seen[index] = (optical, radar)
    assert sorted(seen) == list(range(40))
    for index in (0, 39):
        for pixels, name in zip(seen[index], ("S2L2A", "S1RTC"), strict=True):
            with rasterio.open(datamodule.train_dataset.samples[index][name]) as file:
                assert torch.equal(pixels.float(), torch.from_numpy(file.read().astype("float32")))
    assert datamodule.train_dataset.samples == before
    assert tiles.describe()["fingerprint"] == DatamoduleTiles(datamodule).describe()["fingerprint"]


def test_transform_of_evaluation_is_applied_to_modalities(modalities):
    _, make = modalities
    crop = [albumentations.CenterCrop(32, 32), ToTensorV2()]
    batch = next(iter(DatamoduleTiles(make(val_transform=crop))))
    assert batch["image"]["S2L2A"].shape[1:] == (12, 32, 32)
    assert batch["image"]["S1RTC"].shape[1:] == (2, 32, 32)
    assert batch["valid"].shape[1:] == (32, 32)


def test_gap_in_one_modality_is_no_data_in_the_tile(modalities):
    root, make = modalities
    path = root / "train" / "S1RTC" / "chip03_S1RTC.tif"
    with rasterio.open(path, "r+") as file:
        pixels = file.read()
        pixels[0, :5, 3:9] = np.nan
        file.write(pixels)
    tiles = {
        index: valid
        for batch in DatamoduleTiles(make())
        for index, valid in zip(batch["index"], batch["valid"], strict=True)
    }
    gaps = {index: int((~valid).sum()) for index, valid in tiles.items() if not valid.all()}
    assert gaps == {3: 30}


def test_damaged_modality_is_skipped_and_named(modalities):
    root, make = modalities
    datamodule = make()
    path = root / "train" / "S2L2A" / "chip07_S2L2A.tif"
    path.write_bytes(path.read_bytes()[:500])
    tiles = DatamoduleTiles(datamodule)
    assert sum(len(batch["index"]) for batch in tiles) == 39
    assert tiles.skipped == {"unreadable": 1}
    assert "chip07_S2L2A.tif" in str(tiles.skips)


def test_scalar_labels_of_modalities_are_left_out(modalities, tmp_path):
    _, make = modalities
    for split in ("train", "val"):
        names = [path.name.removesuffix("_S2L2A.tif") for path in (tmp_path / "land_cover" / split / "S2L2A").iterdir()]
        rows = "".join(f"{name},1\n" for name in sorted(names))
        (tmp_path / f"{split}.csv").write_text("sample,label\n" + rows)
    labels = {f"{split}_label_data_root": str(tmp_path / f"{split}.csv") for split in ("train", "val")}
    datamodule = make(task="classification", label_grep=None, **labels)
    batch = next(iter(DatamoduleTiles(datamodule)))
    assert batch.keys() == {"image", "valid", "index", "position", "path"}


def test_dataset_of_another_name_is_found_through_the_loader():
    class Named(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Ones(), batch_size=2, shuffle=True)

    class Ones(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"image": torch.ones(2, 4, 4) * index, "label": index}

    batches = list(DatamoduleTiles(Named()))
    assert sorted(index for batch in batches for index in batch["index"]) == list(range(5))
    assert "label" not in batches[0]


# --- masks and pixels are of one image, whatever a dataset draws


HOLE = -7.0


class Holes(Dataset):
    """Images of which each lacks pixels somewhere, filled as TerraTorch's datasets fill them; ``after`` is a transform."""

    def __init__(self, after, count=24, names=("transform",)):
        self.no_data_replace = HOLE
        self.count = count
        for name in names:
            setattr(self, name, after)
        self.after = after

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.random.default_rng(index).random((16, 16, 3), dtype=np.float32)
        image[2:6, 1 + index % 8 : 5 + index % 8] = np.nan
        if self.no_data_replace is not None:
            image = np.nan_to_num(image, nan=self.no_data_replace)
        return {"image": self.after(image), "mask": np.zeros((16, 16))}


class Data(LightningDataModule):
    """A user's own: no ``train_transform``, the transform is the dataset's."""

    def __init__(self, dataset, workers=0):
        super().__init__()
        self.train_dataset, self.batch_size, self.num_workers = dataset, 5, workers


class Draws:
    """Flips by chance, by one of the generators that there are."""

    def __init__(self, kind, generator=None):
        self.kind, self.generator = kind, generator

    def __call__(self, image):
        source = {"python": random, "numpy": np.random, "own": self.generator}.get(self.kind)
        flipped = torch.rand(()).item() < 0.5 if source is None else source.random() < 0.5
        return torch.from_numpy(np.ascontiguousarray(image[::-1] if flipped else image)).permute(2, 0, 1)


class OwnGenerator(Holes):
    """Draws from a generator of its own."""

    def __init__(self):
        super().__init__(Draws("own"))
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index):
        self.after.generator = self.generator
        return super().__getitem__(index)


def albumented(*transforms):
    compose = albumentations.Compose([*transforms, ToTensorV2()])
    return Albumented(compose)


class Albumented(Holes):
    def __init__(self, compose):
        super().__init__(None)
        self.transform = compose

    def __getitem__(self, index):
        self.after = lambda image: self.transform(image=image)["image"]
        return super().__getitem__(index)


class OfTensors(Holes):
    """Transforms of torchvision or kornia, which take tensors."""

    def __init__(self, transform):
        super().__init__(None)
        self.transform = transform

    def __getitem__(self, index):
        self.after = lambda image: self.transform(torch.from_numpy(image).permute(2, 0, 1)).reshape(3, *self.size())
        return super().__getitem__(index)

    def size(self):
        return (16, 16)


def crops_of(kind):
    crop = {
        "albumentations": albumented(albumentations.RandomCrop(8, 8)),
        "torchvision": OfTensors(torchvision.transforms.v2.Compose([torchvision.transforms.v2.RandomCrop(8)])),
        "kornia": OfTensors(torch.nn.Sequential(kornia.augmentation.RandomCrop((8, 8)))),
    }[kind]
    crop.size = lambda: (8, 8)
    return crop


RANDOM = {
    "Python": lambda: Holes(Draws("python")),
    "NumPy": lambda: Holes(Draws("numpy")),
    "PyTorch": lambda: Holes(Draws("torch")),
    "a generator of its own": OwnGenerator,
    "a crop of albumentations": lambda: crops_of("albumentations"),
    "a crop of torchvision": lambda: crops_of("torchvision"),
    "a crop of kornia": lambda: crops_of("kornia"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", RANDOM)
def test_mask_is_that_of_the_pixels_whatever_is_drawn(kind, workers):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    tiles = DatamoduleTiles(Data(RANDOM[kind](), workers))
    found = {index: (image, valid) for index, image, valid in one_by_one(tiles)}
    assert len(found) == 24
    for image, valid in found.values():
        assert torch.equal(~valid, (image == HOLE).all(dim=0))
    assert any(not valid.all() for _, valid in found.values())
    for index, image, valid in one_by_one(tiles):
        assert torch.equal(image, found[index][0])
        assert torch.equal(valid, found[index][1])
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


FLIPS = {
    "albumentations": lambda: albumented(albumentations.D4(), albumentations.HorizontalFlip(p=0.5)),
    "one of several": lambda: albumented(
        albumentations.OneOf([albumentations.HorizontalFlip(p=0.5), albumentations.RandomRotate90()], p=1.0)
    ),
    "torchvision": lambda: OfTensors(
        torchvision.transforms.v2.Compose([torchvision.transforms.v2.RandomHorizontalFlip(), torch.nn.Identity()])
    ),
    "torchvision alone": lambda: OfTensors(torchvision.transforms.v2.RandomVerticalFlip()),
    "kornia": lambda: OfTensors(torch.nn.Sequential(kornia.augmentation.RandomHorizontalFlip())),
    "kornia alone": lambda: OfTensors(kornia.augmentation.RandomVerticalFlip(p=1.0)),
}


@pytest.mark.parametrize("kind", FLIPS)
def test_random_transforms_of_the_dataset_itself_are_disabled_and_named(kind, caplog):
    dataset = FLIPS[kind]()
    kept = dataset.transform
    with caplog.at_level("INFO"):
        tiles = DatamoduleTiles(Data(dataset))
    assert "Random transforms of Data are disabled: " in caplog.text
    plain = Holes(lambda image: torch.from_numpy(image).permute(2, 0, 1))
    for index, image, valid in one_by_one(tiles):
        assert torch.equal(image, plain[index]["image"])
        assert (~valid).sum() == 16
    assert dataset.transform is kept


def test_transforms_of_the_user_are_neither_changed_nor_moved_on():
    dataset = albumented(albumentations.RandomCrop(8, 8), albumentations.HorizontalFlip(p=0.5))
    dataset.transform.set_random_seed(3)
    before = [type(transform).__name__ for transform in dataset.transform.transforms]
    list(DatamoduleTiles(Data(dataset)))
    assert [type(transform).__name__ for transform in dataset.transform.transforms] == before
    again = albumented(albumentations.RandomCrop(8, 8), albumentations.HorizontalFlip(p=0.5))
    again.transform.set_random_seed(3)
    assert torch.equal(dataset[0]["image"], again[0]["image"])


def test_transform_of_the_users_own_validation_dataset_is_taken():
    datamodule = Data(albumented(albumentations.RandomCrop(8, 8)))
    datamodule.val_dataset = albumented(albumentations.CenterCrop(8, 8))
    for index, image, _ in one_by_one(DatamoduleTiles(datamodule)):
        assert torch.equal(image, datamodule.val_dataset[index]["image"])


def test_dataset_that_is_another_in_every_read_is_an_error():
    class Counts(Holes):
        reads = 0

        def __getitem__(self, index):
            Counts.reads += 1
            sample = super().__getitem__(index)
            return {"image": sample["image"] + Counts.reads * (sample["image"] != HOLE)}

    tiles = DatamoduleTiles(Data(Counts(lambda image: torch.from_numpy(image).permute(2, 0, 1))))
    with pytest.raises(TilesError, match=r"with RuntimeError .the image differs from one read to the next"):
        list(tiles)


# --- damage, and errors in code


class Raises(Dataset):
    """Whatever a dataset or a transform may do wrong on an image that is whole."""

    def __init__(self, files, error, on=None):
        self.image_files, self.error, self.on = files, error, on

    def __len__(self):
        return len(self.image_files)

    def __getitem__(self, index):
        if self.on is None or index in self.on:
            if self.error is ZeroDivisionError:
                1 / 0  # noqa: B018
            raise self.error("columns of the table")
        return {"image": torch.ones(2, 8, 8)}


ERRORS = [IndexError, KeyError, TypeError, AttributeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on", [None, [7]], ids=["every image", "one"])
@pytest.mark.parametrize("error", ERRORS)
def test_error_in_code_is_no_damaged_file(folder, error, on, workers):
    dataset = Raises([str(image_path(folder, number)) for number in range(COUNT)], error, on)
    with pytest.raises(TilesError) as found:
        list(DatamoduleTiles(Data(dataset, workers)))
    message = str(found.value)
    assert message.startswith("Raises of Data failed on ")
    assert f"with {error.__name__} (" in message
    assert message.endswith("fix the dataset or its transform, or give the callback tiles of its own.")
    assert "repair or remove" not in message
    if workers:
        assert "Traceback" in str(found.value.__cause__)
        assert "columns of the table" in str(found.value.__cause__) or error is ZeroDivisionError
    else:
        assert type(found.value.__cause__) is error


def test_error_of_a_transform_is_no_damaged_file(folder):
    class Needs(albumentations.ImageOnlyTransform):
        def apply(self, img, **_):
            return img["red"]

    with pytest.raises(TilesError, match=r"GenericNonGeoSegmentationDataset .*_image\.tif with IndexError .* in apply"):
        list(DatamoduleTiles(segmentation(folder, test_transform=[Needs(p=1.0), ToTensorV2()])))


def test_damage_that_shows_later_is_damage(classes):
    """tifffile reads the rest of this file as an empty array, of which the bands cannot be taken."""
    path = classes / "wet" / "07.tif"
    path.write_bytes(path.read_bytes()[:6])
    tiles = DatamoduleTiles(classification(classes, dataset_bands=[1, 2, 3, 4, 5, 6], output_bands=[3, 4]))
    assert sorted(order(tiles)) == [number for number in range(COUNT) if number != 7]
    assert tiles.skipped == {"unreadable": 1}


@pytest.mark.parametrize("broken", [[3], range(12)], ids=["one", "every file"])
def test_files_of_other_kinds_are_judged_by_where_it_failed(tmp_path, broken):
    class Arrays(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return {"image": torch.from_numpy(np.load(tmp_path / f"{index}.npy"))}

    for number in range(12):
        np.save(tmp_path / f"{number}.npy", np.ones((2, 8, 8), np.float32))
        if number in broken:
            path = tmp_path / f"{number}.npy"
            path.write_bytes(path.read_bytes()[:200])
    tiles = DatamoduleTiles(Data(Arrays()))
    if len(broken) == 1:
        assert sorted(order(tiles)) == [number for number in range(12) if number != 3]
        assert tiles.skipped == {"unreadable": 1}
    else:  # what fails on every file is more likely how they are read
        with pytest.raises(TilesError, match=r"Arrays of Data failed on image .* with ValueError"):
            list(tiles)


def test_first_image_may_be_damaged_where_labels_are_needed(folder, caplog):
    class NeedsLabels(Raises):
        segmentation_mask_files = (1, 2)

        def __getitem__(self, index):
            pixels = pixels_of(self.image_files[index])
            return {"image": torch.from_numpy(pixels), "mask": self.segmentation_mask_files[index % 2]}

    files = [str(image_path(folder, number)) for number in range(COUNT)]
    first = DatamoduleTiles(Data(Raises(files, KeyError, [])))._order[0]
    Path(files[first]).write_bytes(b"II*")
    with caplog.at_level("INFO"):
        tiles = DatamoduleTiles(Data(NeedsLabels(files, KeyError)))
        assert len(order(tiles)) == COUNT - 1
    assert caplog.text.count("NeedsLabels reads no image without its label: labels are read and dropped.") == 1
    assert tiles.skipped == {"unreadable": 1}


# --- nothing to read


def test_no_images_name_root_glob_and_split_file(folder, tmp_path):
    split = tmp_path / "none.txt"
    split.write_text("somewhere_else\n")
    wrong = {"img_grep": {"img_grep": "*.png"}, "split": {"train_split": split}}
    for more in wrong.values():
        datamodule = segmentation(folder, **more)
        with pytest.raises(ConfigurationError, match=r"^No training images in GenericNonGeo") as error:
            DatamoduleTiles(datamodule)
        for part in (f"data root {folder / 'images'}", f"glob {more.get('img_grep', '*_image.tif')}", "split file "):
            assert part in str(error.value)
        assert str(more.get("train_split", "train.txt")) in str(error.value)


def test_files_are_looked_up_once(folder, monkeypatch):
    import os

    tiles, looked_up, stat = DatamoduleTiles(segmentation(folder)), [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *args, **kwargs: looked_up.append(str(path)) or stat(path, *args, **kwargs))
    for _ in range(3):
        tiles.describe()
        tiles.modification_fingerprint()
    assert sorted(path for path in looked_up if path.endswith("_image.tif")) == sorted(
        str(image_path(folder, number)) for number in range(COUNT)
    )


def test_fingerprint_follows_the_files_of_every_modality(modalities):
    root, make = modalities
    first = DatamoduleTiles(make()).describe()
    path = root / "train" / "S1RTC" / "chip03_S1RTC.tif"
    path.write_bytes(path.read_bytes() + b"\0")
    assert DatamoduleTiles(make()).describe() != first
