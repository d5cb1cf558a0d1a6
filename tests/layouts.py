"""Small data in the layouts that the configs expect: real chips where there are some, generated ones elsewhere."""

import json
import pickle

import h5py
import numpy as np
import pandas as pd
import rasterio
from PIL import Image

from tests.rasters import write

CHIPS = {"train": 40, "val": 4, "test": 4}


def smooth(*shape, seed=0):
    """Images that differ from each other as places do: a tint, and smooth structure."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(*shape[:-2], 4, 4))
    scale = (np.array(shape[-2:]) + 3) // 4
    fine = np.kron(coarse, np.ones(scale))[..., : shape[-2], : shape[-1]]
    return fine + random.normal(size=(*shape[:-2], 1, 1)) + 0.1 * random.normal(size=shape)


def splits(folder, names, **extra):
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, count in CHIPS.items():
        (folder / f"{split}.txt").write_text("\n".join(names[start : start + count]))
        start += count


def land_cover(folder, shared_data, size=48):
    """TerraMind's three places, cut into 48 chips of 48 px."""
    places = sorted(path.name.removesuffix("_S2L2A.tif") for path in (shared_data / "terramind_examples/S2L2A").iterdir())
    order = [(place, row, column) for row in range(4) for column in range(4) for place in places]
    for number, (place, row, column) in enumerate(order):
        split = "train" if number < 40 else "val" if number < 44 else "test"
        for kind in ("S2L2A", "S1RTC", "LULC"):
            with rasterio.open(shared_data / "terramind_examples" / kind / f"{place}_{kind}.tif") as source:
                pixels = source.read(window=((row * size, (row + 1) * size), (column * size, (column + 1) * size)))
            write(folder / "land_cover" / split / kind / f"chip{number:02d}_{kind}.tif", pixels)


def floods(folder, shared_data, size=64):
    """Sen1Floods11's three quadrants, cut into 48 chips of 64 px."""
    names = []
    for quadrant in range(3):
        for row in range(4):
            for column in range(4):
                name = f"q{quadrant}_{row}{column}"
                for kind in ("S2Hand", "LabelHand"):
                    path = shared_data / "sen1floods11_sample" / kind / f"Spain_7370579_q{quadrant}_{kind}.tif"
                    with rasterio.open(path) as source:
                        pixels = source.read(window=((row * size, (row + 1) * size), (column * size, (column + 1) * size)))
                        nodata = source.nodata
                    write(folder / kind / f"{name}_{kind}.tif", pixels, nodata=nodata)
                names.append(name)
    splits(folder / "splits", names)


def cifar100(folder, _shared_data):
    for split, count in {"train": 12, "val": 2, "test": 2}.items():
        for label, name in enumerate(("apple", "bee", "sea")):
            (folder / "cifar100" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = smooth(3, 32, 32, seed=100 * number + label)
                image = np.clip(127 + 50 * pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0)
                Image.fromarray(image).save(folder / "cifar100" / split / name / f"{number}.png")


def bigearthnet(folder, _shared_data):
    root = folder / "geobench/classification_v1.0/m-bigearthnet"
    root.mkdir(parents=True)
    bands = ["01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red", "05", "06", "07", "08", "08A", "09", "11", "12"]
    labels, partition, number = {}, {}, 0
    for split, count in {"train": 40, "valid": 4, "test": 4}.items():
        partition[split] = [f"id_{number + i:04d}" for i in range(count)]
        for name in partition[split]:
            pixels = 1000 + 300 * smooth(12, 120, 120, seed=number)
            with h5py.File(root / f"{name}.hdf5", "w") as file:
                for band, values in zip(bands, pixels, strict=True):
                    file[band] = values.astype(np.float32)
            labels[name] = [int(number % 5 == i) for i in range(43)]
            number += 1
    (root / "label_stats.json").write_text(json.dumps(labels))
    (root / "default_partition.json").write_text(json.dumps(partition))


def bigearthnet_v2(folder, _shared_data, size=24):
    root = folder / "bigearthnet_v2"
    bands = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    splits = [split for split, count in {"train": 40, "validation": 4, "test": 4}.items() for _ in range(count)]
    names = [f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_{number:02d}" for number in range(len(splits))]
    for number, name in enumerate(names):
        pixels = (1000 + 300 * smooth(12, size, size, seed=number)).astype(np.uint16)
        for band, values in zip(bands, pixels, strict=True):
            write(root / "BigEarthNet-S2" / name.rsplit("_", 2)[0] / name / f"{name}_{band}.tif", values[None])
    classes = ("Pastures", "Inland waters", "Coniferous forest")
    labels = [[classes[number % 3], "Arable land"][: 1 + number % 2] for number in range(len(names))]
    pd.DataFrame({"patch_id": names, "labels": labels, "split": splits}).to_parquet(root / "metadata.parquet")


def sen4map(folder, _shared_data):
    root = folder / "sen4map"
    root.mkdir()
    for split, count in CHIPS.items():
        keys = [f"point_{i}" for i in range(count)]
        with h5py.File(root / f"{split}.h5", "w") as file:
            for i, key in enumerate(keys):
                group = file.create_group(key)
                for j, band in enumerate(("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")):
                    group[band] = (2000 + 500 * smooth(12, 24, 24, seed=100 * i + j)).astype(np.float32)
                group["SCL"] = np.full((12, 24, 24), 4)
                group.attrs["Image_ID"] = np.array(
                    [f"2018{month:02d}15" for month in range(1, 13)], dtype=h5py.string_dtype()
                )
                group.attrs["lc1"] = ("A10", "B10", "C10")[i % 3]
        (root / f"{split}_keys.pkl").write_bytes(pickle.dumps(keys))


def mados(folder, _shared_data):
    names = [f"Scene_{i:02d}" for i in range(sum(CHIPS.values()))]
    for number, name in enumerate(names):
        write(
            folder / "mados/images" / f"{name}_image.tif", (500 + 200 * smooth(11, 64, 64, seed=number)).astype(np.float32)
        )
        labels = np.clip(smooth(1, 64, 64, seed=number) * 5 + 3, 0, 15).astype(np.uint8)
        write(folder / "mados/masks" / f"{name}_mask.tif", labels)
    splits(folder / "mados/splits", names)


def hls_water(folder, shared_data):
    (folder / "hls_water").symlink_to(shared_data / "hls_water")
