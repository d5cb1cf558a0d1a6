"""Every datamodule class that TerraTorch ships, on a few tiny images in its own layout, or the reason why it has no stream.

A row of ``STREAMED`` writes its data into a folder and gives the datamodule; of ``REFUSED``, the same and what is said;
``NOT_SET_UP`` are those that this version of TerraTorch cannot set up at all; ``MISSING`` need packages that are not here.
"""

import importlib
import json
import pickle
from functools import partial

import albumentations as A
import h5py
import numpy as np
import pandas as pd
import pytest
import terratorch.datamodules as shipped
import torch
from albumentations.pytorch import ToTensorV2
from lightning.pytorch import LightningDataModule
from PIL import Image
from terratorch.datasets.transforms import FlattenTemporalIntoChannels, UnflattenTemporalFromChannels
from torch.utils.data import IterableDataset
from torchgeo.datamodules import GeoDataModule, NonGeoDataModule
from torchgeo.datasets import NonGeoDataset, RasterDataset
from torchgeo.samplers import RandomBatchGeoSampler

from tests import layouts
from tests.installed import since
from tests.layouts import smooth
from tests.rasters import write

SIZE = 24
GAP = (slice(None), slice(0, 5), slice(3, 9))
GAP_PIXELS = 30
COUNT = 5
NODATA = -9999


def flip(*more):
    """What is not to be seen: the last row of every image comes first."""
    return [A.VerticalFlip(p=1.0), *more, ToTensorV2()]


def temporal(steps, *more):
    return [FlattenTemporalIntoChannels(), *more, ToTensorV2(), UnflattenTemporalFromChannels(n_timesteps=steps)]


def raster(path, bands, number, gap=False, dtype="float32", scale=300):
    """A raster whose first one may lack some pixels."""
    pixels = (1000 + scale * smooth(bands, SIZE, SIZE, seed=number)).astype(dtype)
    if gap:
        pixels[GAP] = NODATA
    write(path, pixels, nodata=NODATA if np.issubdtype(pixels.dtype, np.floating) else None)


def labels(path, number, classes=2):
    write(path, ((smooth(1, SIZE, SIZE, seed=number) > 0) * (classes - 1)).astype("int16"))


# --- rasters


def pairs(folder, bands=3):
    for split in ("train", "val"):
        for number in range(COUNT):
            raster(folder / split / f"{number}_image.tif", bands, number, gap=number == 0)
            labels(folder / split / f"{number}_mask.tif", number)
    roots = {f"{split}_data_root": folder / ("val" if split == "test" else split) for split in ("train", "val", "test")}
    return {**roots, "img_grep": "*_image.tif", "label_grep": "*_mask.tif", "batch_size": 2, "num_workers": 0}


def generic_segmentation(folder):
    return shipped.GenericNonGeoSegmentationDataModule(
        num_classes=2, no_data_replace=0, train_transform=flip(), **pairs(folder)
    )


def generic_regression(folder):
    return shipped.GenericNonGeoPixelwiseRegressionDataModule(
        no_data_replace=-1, constant_scale=0.5, train_transform=flip(), **pairs(folder)
    )


def taco(folder, form="data.tacozip"):
    """TACO data of images with labels, in one file or in a folder."""
    pytest.importorskip("tacoreader")
    create = pytest.importorskip("tacotoolbox").create
    from tacotoolbox.datamodel import Sample, Taco, Tortilla

    samples = []
    for number in range(2 * COUNT):
        image, label = folder / f"{number}_image.tif", folder / f"{number}_label.tif"
        raster(image, 3, number, gap=number == 0)
        labels(label, number)
        pair = Sample(id=f"pair_{number}", path=Tortilla([Sample(id="image", path=image), Sample(id="label", path=label)]))
        pair.extend_with({"tortilla:data_split": "train" if number < COUNT else "validation"})
        samples.append(pair)
    about = {"id": "pairs", "dataset_version": "1.0.0", "description": "Generated.", "licenses": ["CC0-1.0"]}
    data = Taco(tortilla=Tortilla(samples), providers=[{"name": "tests"}], tasks=["semantic-segmentation"], **about)
    create(data, folder / form)
    return folder / form


def generic_taco(folder, form="data.tacozip"):
    path = taco(folder, form)
    return shipped.GenericNonGeoSegmentationDataModule(
        num_classes=2, no_data_replace=0, train_transform=flip(), batch_size=2, num_workers=0, tortilla_file=path
    )


def generic_classification(folder):
    for split in ("train", "val"):
        for number in range(COUNT):
            raster(folder / split / ("dry", "wet")[number % 2] / f"{number}.tif", 3, number)
    roots = {f"{split}_data_root": folder / ("val" if split == "test" else split) for split in ("train", "val", "test")}
    return shipped.GenericNonGeoClassificationDataModule(
        num_classes=2, batch_size=2, num_workers=0, means=[0.0] * 3, stds=[1.0] * 3, train_transform=flip(), **roots
    )


def generic_boxes(folder):
    arguments = pairs(folder)
    for path in folder.rglob("*_image.tif"):
        path.with_suffix(".json").write_text(json.dumps({"boxes": [[1, 1, 5, 5]], "labels": [0]}))
    return shipped.GenericNonGeoObjectDetectionDataModule(
        num_classes=1, train_transform=flip(), val_transform=[ToTensorV2()], test_transform=[ToTensorV2()],
        **{**arguments, "label_grep": "*.json"},
    )  # fmt: skip


def multimodal(folder):
    for split in ("train", "val"):
        for number in range(COUNT):
            raster(folder / split / "S2" / f"{number}_s2.tif", 3, number)
            raster(folder / split / "S1" / f"{number}_s1.tif", 2, 50 + number, gap=number == 0)
            labels(folder / split / "labels" / f"{number}_mask.tif", number)
    roots = {f"{split}_data_root": {m: str(folder / split / m) for m in ("S2", "S1")} for split in ("train", "val")}
    masks = {f"{split}_label_data_root": str(folder / split / "labels") for split in ("train", "val")}
    return shipped.GenericMultiModalDataModule(
        task="segmentation", batch_size=2, num_workers=0, num_classes=2, modalities=["S2", "S1"],
        image_grep={"S2": "*_s2.tif", "S1": "*_s1.tif"}, label_grep="*_mask.tif", no_data_replace=0,
        constant_scale={"S1": 0.1}, means={"S2": [0.0] * 3, "S1": [0.0] * 2}, stds={"S2": [1.0] * 3, "S1": [1.0] * 2},
        train_transform=flip(), **roots, **masks,
    )  # fmt: skip


def fire_scars(folder):
    for split in ("training", "validation"):
        for number in range(COUNT):
            raster(folder / split / f"a{number}_merged.tif", 6, number, gap=number == 0)
            labels(folder / split / f"a{number}.mask.tif", number)
    return shipped.FireScarsNonGeoDataModule(str(folder), batch_size=2, train_transform=flip())


def sen1floods11(folder):
    hand, splits = folder / "v1.1/data/flood_events/HandLabeled", folder / "v1.1/splits/flood_handlabeled"
    splits.mkdir(parents=True)
    for number in range(2 * COUNT):
        raster(hand / "S2Hand" / f"Spain_{number:03d}_S2Hand.tif", 13, number, gap=number == 0)
        labels(hand / "LabelHand" / f"Spain_{number:03d}_LabelHand.tif", number)
    for part, split in enumerate(("train", "valid")):
        names = [f"Spain_{number:03d}\n" for number in range(part * COUNT, (part + 1) * COUNT)]
        (splits / f"flood_{split}_data.txt").write_text("".join(names))
    return shipped.Sen1Floods11NonGeoDataModule(str(folder), batch_size=2, train_transform=flip())


def multi_temporal(folder):
    for split in ("training", "validation"):
        names = [f"chip_{number:03d}" for number in range(COUNT)]
        for number, name in enumerate(names):
            raster(folder / f"{split}_chips" / f"{name}_merged.tif", 18, number, gap=number == 0)
            labels(folder / f"{split}_chips" / f"{name}.mask.tif", number)
        (folder / f"{split}_data.txt").write_text("\n".join(names))
    return shipped.MultiTemporalCropClassificationDataModule(
        str(folder), batch_size=2, no_data_replace=0, train_transform=temporal(3, A.VerticalFlip(p=1.0)),
        val_transform=temporal(3), test_transform=temporal(3),
    )  # fmt: skip


def burn_intensity(folder):
    names = [f"case{number}" for number in range(2 * COUNT)]
    for number, name in enumerate(names):
        for step, when in enumerate(("pre", "during", "post")):
            raster(folder / when / f"HLS_{name}.tif", 6, 10 * number + step, gap=number == 0 and when == "during")
        labels(folder / "pre" / f"BS_{name}.tif", number, classes=5)
    pd.DataFrame({"Case_Name": names}).to_csv(folder / "BS_files_raw.csv")
    for part, split in enumerate(("train", "val")):
        (folder / f"{split}.txt").write_text(
            "\n".join(f"HLS_{name}.tif" for name in names[part * COUNT : (part + 1) * COUNT])
        )
    return shipped.BurnIntensityNonGeoDataModule(
        str(folder), batch_size=2, train_transform=temporal(3, A.VerticalFlip(p=1.0)), val_transform=temporal(3)
    )


def carbon_flux(folder):
    from terratorch.datasets.carbonflux import CarbonFluxNonGeo

    rows = []
    for split in ("train", "test"):
        for number in range(COUNT):
            raster(folder / split / f"{split}{number}.tiff", 6, number, gap=number == 0)
            values = dict.fromkeys(CarbonFluxNonGeo.merra_var_names, float(number))
            rows.append({"Chip": f"{split}{number}.tif", **values, "GPP": 1.0})
    pd.DataFrame(rows).to_csv(folder / CarbonFluxNonGeo.metadata_file)
    return shipped.CarbonFluxNonGeoDataModule(str(folder), batch_size=2)


def open_earth_map(folder):
    for split in ("train", "val"):
        for number in range(COUNT):
            raster(folder / f"{split}town" / "images" / f"{split}town_{number}.tif", 3, number)
            labels(folder / f"{split}town" / "labels" / f"{split}town_{number}.tif", number)
        (folder / f"{split}.txt").write_text("\n".join(f"{split}town_{number}.tif" for number in range(COUNT)))
    return shipped.OpenEarthMapNonGeoDataModule(data_root=str(folder), batch_size=2, crop_size=16)


def biomassters(folder):
    rows = []
    for split in ("train", "test"):
        for number in range(COUNT):
            for month in range(2):
                name = f"{split}{number}_S2_{month:02d}.tif"
                raster(folder / f"{split}_features" / name, 11, 10 * number + month, dtype="uint16")
                chip = f"{split}{number}"
                row = {"filename": name, "chip_id": chip, "satellite": "S2", "split": split, "month": f"m{month}"}
                rows.append({**row, "corresponding_agbm": f"{chip}_agbm.tif"})
            write(folder / f"{split}_agbm" / f"{split}{number}_agbm.tif", smooth(1, SIZE, SIZE, seed=number))
    pd.DataFrame(rows).to_csv(folder / "features.csv")
    from terratorch.datasets import BioMasstersNonGeo

    return shipped.BioMasstersNonGeoDataModule(
        str(folder), batch_size=2, sensors=["S2"], bands={"S2": BioMasstersNonGeo.S2_BAND_NAMES[:6]},
        metadata_filename="features.csv", include_corrupt=True, as_time_series=True,
        train_transform=temporal(2, A.VerticalFlip(p=1.0)), val_transform=temporal(2),
    )  # fmt: skip


# --- arrays of other kinds


def forestnet(folder):
    for split in ("train", "val"):
        for number in range(COUNT):
            place = folder / f"{split}{number}" / "images"
            for kind in ("visible", "infrared"):
                (place / kind).mkdir(parents=True)
            for year in (2015, 2016, 2017):
                pixels = np.clip(127 + 40 * smooth(3, SIZE, SIZE, seed=10 * number + year), 0, 255).astype(np.uint8)
                Image.fromarray(pixels.transpose(1, 2, 0)).save(place / "visible" / f"{year}_01_02_cloud_1.png")
                np.save(place / "infrared" / f"{year}_01_02_cloud_1.npy", pixels.transpose(1, 2, 0))
        rows = {"example_path": [f"{split}{number}" for number in range(COUNT)], "merged_label": ["Other"] * COUNT}
        pd.DataFrame(rows).to_csv(folder / f"{split}_filtered.csv")
    return shipped.ForestNetNonGeoDataModule(
        str(folder), batch_size=2, train_transform=temporal(3, A.VerticalFlip(p=1.0)), val_transform=temporal(3)
    )


def landslide4sense(folder):
    for split in ("train", "validation"):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(COUNT):
            with h5py.File(folder / "images" / split / f"image_{number}.h5", "w") as file:
                file["img"] = smooth(14, SIZE, SIZE, seed=number).transpose(1, 2, 0)
            with h5py.File(folder / "annotations" / split / f"mask_{number}.h5", "w") as file:
                file["mask"] = (smooth(SIZE, SIZE, seed=number) > 0).astype(np.uint8)
    return shipped.Landslide4SenseNonGeoDataModule(str(folder), batch_size=2, train_transform=flip())


def open_sentinel_map(folder):
    rows = []
    for number in range(COUNT):
        place = folder / "osm_sentinel_imagery" / "31TBF" / str(number)
        place.mkdir(parents=True)
        for day in (1, 2, 3):
            arrays = {
                f"gsd_{res}": smooth(bands, SIZE * 10 // res, SIZE * 10 // res, seed=10 * number + day).transpose(1, 2, 0)
                for res, bands in ((10, 4), (20, 6), (60, 2))
            }
            np.savez(place / f"S2_2020010{day}.npz", **arrays)
        label = folder / "osm_label_images_v10" / "31TBF" / f"{number}.png"
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((192, 192, 3), np.uint8)).save(label)
        rows.append({"MGRS_tile": "31TBF", "cell_id": number, "split": "testing"})
    pd.DataFrame(rows).to_csv(folder / "spatial_cell_info.csv")
    (folder / "osm_categories.json").write_text("{}")
    return shipped.OpenSentinelMapDataModule(
        bands=["gsd_10"], data_root=str(folder), batch_size=2, train_transform=temporal(2), val_transform=temporal(2)
    )


def pastis(folder):
    import geopandas
    from shapely.geometry import Point

    for kind in ("DATA_S2", "ANNOTATIONS"):
        (folder / kind).mkdir()
    folds, dates = [1, 2, 3, 1, 2, 4, 5], json.dumps({"0": 20180910, "1": 20181010})
    for number in range(len(folds)):
        np.save(folder / "DATA_S2" / f"S2_{number}.npy", 1000 + 300 * smooth(2, 10, SIZE, SIZE, seed=number))
        np.save(folder / "ANNOTATIONS" / f"TARGET_{number}.npy", np.zeros((3, SIZE, SIZE), np.uint8))
    geopandas.GeoDataFrame(
        {"ID_PATCH": range(len(folds)), "Fold": folds, "dates-S2": [dates] * len(folds)},
        geometry=[Point(0, 0)] * len(folds),
    ).to_file(folder / "metadata.geojson", driver="GeoJSON")
    norm = {f"Fold_{fold}": {"mean": [1000.0] * 10, "std": [300.0] * 10} for fold in range(1, 6)}
    (folder / "NORM_S2_patch.json").write_text(json.dumps(norm))
    return shipped.PASTISDataModule(
        batch_size=2, data_root=str(folder), train_transform=temporal(2, A.VerticalFlip(p=1.0)), val_transform=temporal(2)
    )


def sen4map(folder):
    layouts.sen4map(folder, None)
    root = folder / "sen4map"
    paths = {f"{split}_hdf5_path": str(root / f"{split}.h5") for split in ("train", "val")}
    keys = {f"{split}_hdf5_keys_path": str(root / f"{split}_keys.pkl") for split in ("train", "val")}
    return shipped.Sen4MapLucasDataModule(batch_size=2, num_workers=0, prefetch_factor=None, **paths, **keys)


def substation(folder):
    for kind in ("image_stack", "mask"):
        (folder / kind).mkdir()
    for number in range(2 * COUNT):
        np.savez(folder / "image_stack" / f"{number}.npz", 1000 + 300 * smooth(2, 13, SIZE, SIZE, seed=number))
        np.savez(folder / "mask" / f"{number}.npz", np.zeros((SIZE, SIZE), np.uint8))
    rows = {
        "image": [f"image_stack/{number}.npz" for number in range(2 * COUNT)],
        "split": ["train"] * COUNT + ["val"] * COUNT,
    }
    pd.DataFrame(rows).to_csv(folder / "substation_meta_splits_geobench.csv")
    return shipped.SubstationDataModule(
        root=str(folder), batch_size=2, num_workers=0, num_of_timepoints=2, dataset_version="geobench"
    )


def vhr10(folder):
    images = folder / "NWPU VHR-10 dataset" / "positive image set"
    images.mkdir(parents=True)
    (folder / "NWPU VHR-10 dataset.zip").write_bytes(b"")
    annotations = []
    for number in range(8):
        pixels = np.clip(127 + 40 * smooth(3, SIZE, SIZE, seed=number), 0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(images / f"{number + 1:03d}.jpg")
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0,
             "segmentation": [[2, 2, 10, 2, 10, 10, 2, 10]]}
        )  # fmt: skip
    listed = [{"id": number, "file_name": f"{number + 1:03d}.jpg", "width": SIZE, "height": SIZE} for number in range(8)]
    coco = {"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "airplane"}]}
    (images.parent / "annotations.json").write_text(json.dumps(coco))
    return shipped.mVHR10DataModule(
        root=str(folder), batch_size=2, num_workers=0, image_size=SIZE, second_level_split_proportions=(0.5, 0.25, 0.25)
    )


def elephants(folder):
    from terratorch.datamodules.od_aed_elephant import ElephantDataModule

    images = [{"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE} for number in range(COUNT)]
    for number in range(COUNT):
        pixels = np.clip(127 + 40 * smooth(3, SIZE, SIZE, seed=number), 0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number}.png")
    boxes = [
        {"id": 4 * number + part, "image_id": number, "category_id": 1, "bbox": [*corner, 6, 6], "area": 36, "iscrowd": 0}
        for number in range(COUNT)
        for part, corner in enumerate(((2, 2), (14, 2), (2, 14), (14, 14)))
    ]
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "elephant"}]}
    (folder / "boxes.json").write_text(json.dumps(coco))
    paths = [str(folder), str(folder / "boxes.json")]
    caches = {f"tile_cache_{split}": str(folder / split) for split in ("train", "test")}
    return ElephantDataModule(
        *paths, *paths, min_size=(8, 8), tile_size=(12, 12), overlap=0, batch_size=2, num_workers=0, **caches
    )


# --- GEO-Bench

GEOBENCH = {
    "MBeninSmallHolderCashewsNonGeoDataModule": ("m-cashew-plant", 13, "mask"),
    "MBigEarthNonGeoDataModule": ("m-bigearthnet", 12, "table"),
    "MBrickKilnNonGeoDataModule": ("m-brick-kiln", 13, "attribute"),
    "MChesapeakeLandcoverNonGeoDataModule": ("m-chesapeake", 4, "mask"),
    "MEuroSATNonGeoDataModule": ("m-eurosat", 13, "map"),
    "MForestNetNonGeoDataModule": ("m-forestnet", 6, "attribute"),
    "MNeonTreeNonGeoDataModule": ("m-NeonTree", 5, "mask"),
    "MNzCattleNonGeoDataModule": ("m-nz-cattle", 3, "mask"),
    "MPv4gerNonGeoDataModule": ("m-pv4ger", 3, "attribute"),
    "MPv4gerSegNonGeoDataModule": ("m-pv4ger-seg", 3, "mask"),
    "MSACropTypeNonGeoDataModule": ("m-SA-crop-type", 13, "mask"),
    "MSo2SatNonGeoDataModule": ("m-so2sat", 18, "attribute"),
}


def geobench(name):
    directory, bands, kind = GEOBENCH[name]

    def make(folder):
        root = folder / directory
        root.mkdir()
        names = {split: [f"{split}_{number}" for number in range(COUNT)] for split in ("train", "valid")}
        images = [*names["train"], *names["valid"]]
        for number, image in enumerate(images):
            with h5py.File(root / f"{image}.hdf5", "w") as file:
                for band, pixels in enumerate(1000 + 300 * smooth(bands, SIZE, SIZE, seed=number)):
                    file[f"{band:02d} - band_2020-01-02"] = pixels.astype(np.float32)
                if kind == "mask":
                    file["label"] = np.zeros((SIZE, SIZE), np.uint8)
                file.attrs["pickle"] = repr(pickle.dumps({"label": 1}))
        (root / "default_partition.json").write_text(json.dumps(names))
        (root / "label_map.json").write_text(json.dumps({"all": images}))
        (root / "label_stats.json").write_text(json.dumps({image: [1, 0] for image in images}))
        return getattr(shipped, name)(data_root=str(folder), batch_size=2, train_transform=flip())

    return make


# --- wrappers, and images that nobody has stored


class Fields(NonGeoDataset):
    """A dataset as torchgeo's: tensors, and one transform for whole samples."""

    def __init__(self, split="train", transforms=None):
        self.split, self.transforms = split, transforms

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = torch.tensor(smooth(3, SIZE, SIZE, seed=index), dtype=torch.float32)
        sample = {"image": image, "mask": torch.zeros(SIZE, SIZE)}
        return sample if self.transforms is None else self.transforms(sample)


class FieldsDataModule(NonGeoDataModule):
    def __init__(self, batch_size=1, num_workers=0, **kwargs):
        super().__init__(Fields, batch_size, num_workers, **kwargs)


def torchgeo_images(_folder):
    from terratorch.datamodules.torchgeo_data_module import TorchNonGeoDataModule

    return TorchNonGeoDataModule(FieldsDataModule, batch_size=2, transforms=[A.HorizontalFlip(p=0.5), A.D4(), ToTensorV2()])


def tiling(folder):
    return shipped.TilingDataModuleWrapper(
        generic_segmentation(folder), tile_size=(12, 12), overlap=0, cache_dir=str(folder / "cache"), batch_size=2
    )


def dummy(_folder):
    from terratorch.datamodules.dummy_datamodule import DummyDataModule

    return DummyDataModule(num_workers=0, train_samples=COUNT, height=SIZE, width=SIZE)


def noise(_folder):
    from terratorch.datamodules.random import RandomDataModule

    return RandomDataModule(train_samples=COUNT, val_samples=COUNT, input_shape=(3, SIZE, SIZE))


STREAMED = {
    # name: (how it is made, images, pixels that lack data in the first of them)
    "BioMasstersNonGeoDataModule": (biomassters, COUNT, 0),
    "BurnIntensityNonGeoDataModule": (burn_intensity, COUNT, GAP_PIXELS),
    "CarbonFluxNonGeoDataModule": (carbon_flux, COUNT, GAP_PIXELS),
    "ElephantDataModule": (elephants, 16, 0),  # 4 of 5 in 20 tiles
    "DummyDataModule": (dummy, COUNT, 0),
    "FireScarsNonGeoDataModule": (fire_scars, COUNT, GAP_PIXELS),
    "ForestNetNonGeoDataModule": (forestnet, COUNT, 0),
    "GenericMultiModalDataModule": (multimodal, COUNT, GAP_PIXELS),
    "GenericNonGeoClassificationDataModule": (generic_classification, COUNT, 0),
    "GenericNonGeoObjectDetectionDataModule": (generic_boxes, COUNT, 0),  # which does not read nodata as such
    "GenericNonGeoPixelwiseRegressionDataModule": (generic_regression, COUNT, GAP_PIXELS),
    "GenericNonGeoSegmentationDataModule": (generic_segmentation, COUNT, GAP_PIXELS),
    "Landslide4SenseNonGeoDataModule": (landslide4sense, COUNT, 0),
    "MultiTemporalCropClassificationDataModule": (multi_temporal, COUNT, 3 * GAP_PIXELS),
    "OpenEarthMapNonGeoDataModule": (open_earth_map, COUNT, 0),
    "OpenSentinelMapDataModule": (open_sentinel_map, COUNT, 0),
    "PASTISDataModule": (pastis, COUNT, 0),
    "RandomDataModule": (noise, COUNT, 0),
    "Sen1Floods11NonGeoDataModule": (sen1floods11, COUNT, GAP_PIXELS),
    "Sen4MapLucasDataModule": (sen4map, layouts.CHIPS["train"], 0),
    "SubstationDataModule": (substation, COUNT, 0),
    "TilingDataModuleWrapper": (tiling, 4 * COUNT, GAP_PIXELS),
    "TorchNonGeoDataModule": (torchgeo_images, COUNT, 0),
    "mVHR10DataModule": (vhr10, 4, 0),
    **{name: (geobench(name), COUNT, 0) for name in GEOBENCH},
    **since(  # older ones take what tacoreader before 2 reads
        "1.2.12",
        {
            "GenericNonGeoSegmentationDataModule of a TACO file": (generic_taco, COUNT, GAP_PIXELS),
            "GenericNonGeoSegmentationDataModule of a TACO folder": (
                partial(generic_taco, form="data"),
                COUNT,
                GAP_PIXELS,
            ),
        },
    ),
}

DRAWN = {"DummyDataModule", "OpenEarthMapNonGeoDataModule", "OpenSentinelMapDataModule", "RandomDataModule"}
"""Datasets that draw at random in every read, each image anew."""


class Scenes(GeoDataModule):
    """Asked for places on the map, as torchgeo's datamodules of scenes are."""

    def __init__(self, folder=None, batch_size=1, num_workers=0, **kwargs):
        super().__init__(RasterDataset, batch_size, 16, None, num_workers, **kwargs)
        self.folder = folder

    def setup(self, stage):
        for number in range(2):
            raster(self.folder / f"{number}.tif", 3, number)
        self.train_dataset = RasterDataset(str(self.folder))
        self.train_batch_sampler = RandomBatchGeoSampler(self.train_dataset, 16, 2, 4)


class Endless(LightningDataModule):
    """A stream, which cannot be asked for one image."""

    def __init__(self, _folder):
        super().__init__()

    def setup(self, stage):
        class Stream(IterableDataset):
            def __len__(self):
                return 1

            def __iter__(self):
                yield {"image": torch.ones(3, SIZE, SIZE)}

        self.train_dataset = Stream()


class Weather(LightningDataModule):
    """Samples without an image, as those of ERA5DataModule."""

    def __init__(self, _folder, sample=None):
        super().__init__()
        self.sample = sample or {"x": torch.ones(3, 4), "target": torch.ones(1)}

    def setup(self, stage):
        self.train_dataset = [self.sample] * COUNT


def embeddings(folder):
    for name, values in (("embeddings", torch.ones(COUNT, 16)), ("labels", torch.ones(COUNT, 2))):
        torch.save(values, folder / f"{name}.pt")
    torch.save([str(number) for number in range(COUNT)], folder / "patch_ids.pt")
    return shipped.EmbeddingClassificationDataModule(batch_size=2, train_data_root=str(folder))


REFUSED = {
    "places on a map": (
        Scenes,
        r"Scenes samples its RasterDataset by location, expected images by number",
    ),
    "a stream": (Endless, r"Endless iterates over its Stream, expected images by number"),
    "without an image": (Weather, r"A sample of Weather is a dict of \['target', 'x'\], expected a dict with an image"),
    "pairs": (lambda f: Weather(f, (torch.ones(3, 8, 8), 1)), r"A sample of Weather is a tuple, expected a dict"),
    "vectors": (
        lambda f: Weather(f, {"image": np.ones(7)}),
        r"Images of Weather have shape \(7,\), like embeddings",
    ),
    **since(
        "1.2.12",
        {
            "EmbeddingClassificationDataModule": (
                embeddings,
                r"Images of EmbeddingClassificationDataModule have shape \(16,\), like embeddings, expected",
            )
        },
    ),
}
"""What there is no stream of, by a datamodule of the kind or its class in TerraTorch, and what is said."""


def fire_scars_geo(folder):
    from terratorch.datamodules.fire_scars import FireScarsDataModule

    fire_scars(folder)
    return FireScarsDataModule(str(folder))


def sen4agrinet(folder):
    return shipped.Sen4AgriNetDataModule(data_root=str(folder))


def era5(folder):
    return shipped.ERA5DataModule(str(folder), str(folder))


def torchgeo_scenes(folder):
    from terratorch.datamodules.torchgeo_data_module import TorchGeoDataModule

    return TorchGeoDataModule(Scenes, folder=folder)


NOT_SET_UP = {
    # TerraTorch fails on its own, before anything of ours: what it says
    "FireScarsDataModule": (fire_scars_geo, TypeError, "'Field' object is not iterable"),
    "Sen4AgriNetDataModule": (sen4agrinet, TypeError, "unexpected keyword argument"),
    "TorchGeoDataModule": (torchgeo_scenes, AttributeError, "property 'patch_size' .* has no setter"),
    # 491 variables of the whole globe, opened by dask, which is not a dependency
    "ERA5DataModule": (era5, ValueError, "No finetuning NetCDF files found"),
    # a base class, which names no data
    "GeobenchDataModule": (lambda _: importlib.import_module("terratorch.datamodules.geobench_data_module")
                           .GeobenchDataModule(), TypeError, "missing 3 required positional arguments"),
}  # fmt: skip

MISSING = {
    "ECCCDataModule": "granitewxc",
    "GeoBenchV2ClassificationDataModule": "geobench_v2",
    "GeoBenchV2ObjectDetectionDataModule": "geobench_v2",
    "GeoBenchV2SegmentationDataModule": "geobench_v2",
    "HelioNetCDFDataModule": "helio",
    "Merra2DownscaleNonGeoDataModule": "granitewxc",
}
