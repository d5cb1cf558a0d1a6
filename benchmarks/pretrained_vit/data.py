"""Images and labels: land cover and water of HLS tiles, and scenes of RSSCN7."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import Resampling
from torch import Tensor

from benchmarks.study.data import COVER, IGNORED, read_split
from terratorch_simpler.extraction.labelled import majority

RGB = [3, 2, 1]
"""Bands of HLS tiles that are red, green and blue."""
PIXELS = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
"""Mean and standard deviation of the pixels the encoder was pretrained with, for JPEG scenes; HLS has its own."""
SPLITS = ("train", "val", "test")
SCENES = "scenes"
TASKS = ["cover", "water", SCENES]


class Task(NamedTuple):
    """Images and labels of one data set.

    Attributes:
        name: Its name.
        classes: Number of classes.
        images: Normalized images of each split, (N, 3, size, size).
        labels: Class of every patch (N, P), or of every image (N, 1), with ``IGNORED`` where there is none.
        places: What is resampled: the place of every image, (N,).
        labelled: How many training images are labelled, one case each.
    """

    name: str
    classes: int
    images: dict[str, Tensor]
    labels: dict[str, NDArray[np.int64]]
    places: dict[str, NDArray[np.str_]]
    labelled: tuple[int, ...]

    @property
    def scenes(self) -> bool:
        """Whether images have one label each, so that the score is accuracy; otherwise it is mean IoU."""
        return self.name == SCENES


def read_task(data: Path, name: str, size: int, patch: int, train_scenes: int | None = None, swapped: bool = False) -> Task:
    """One of ``TASKS`` from the folder that holds ``hls_water`` and ``rsscn7``.

    Args:
        data: The folder.
        name: Name of the task.
        size: Side of the images in pixels, to which they are resized.
        patch: Side of a patch.
        train_scenes: Number of training scenes that are read, as many of each class; None for all.
        swapped: Whether splits of scenes change places: test scenes are trained on, those ``train_scenes`` validate, and
            the other training scenes test.

    Raises:
        SystemExit: If the folder is missing, or if no training scene would be left to test.
    """
    folder = data / ("rsscn7" if name == SCENES else "hls_water")
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}, expected the data of task {name}: give the folder that holds it.")
    return rsscn7(folder, size, train_scenes, swapped) if name == SCENES else hls(folder, name, size, patch)


def hls(data: Path, target: str, size: int, patch: int) -> Task:
    """Land cover ("cover") or water of HLS tiles, by the majority of each patch."""
    folder = {"cover": "landcover/{}_landcover.tif", "water": "water_mask/{}_mask.tif"}[target]
    codes = list(COVER) if target == "cover" else [0, 1]
    with (data / "tiles.csv").open() as file:
        site = {row["tile"]: row["site_group"] for row in csv.DictReader(file)}
    pixels, labels, places = {}, {}, {}
    for split in SPLITS:
        names = read_split(data, split)
        read = [_read(data / f"images/{name}_image.tif", size, RGB, Resampling.bilinear) for name in names]
        pixels[split] = np.stack(read)
        mask = np.stack([_read(data / folder.format(name), size, [1], Resampling.nearest)[0] for name in names])
        classes = np.select([mask == code for code in codes], range(len(codes)), IGNORED)
        labels[split] = majority(torch.from_numpy(classes), (patch, patch)).flatten(1).numpy()
        places[split] = np.array([site[name] for name in names])
    mean, std = pixels["train"].mean((0, 2, 3)), pixels["train"].std((0, 2, 3))
    images = {split: _normalize(values, mean, std) for split, values in pixels.items()}
    return Task(target, len(codes), images, labels, places, (16, 68))


def rsscn7(data: Path, size: int, train_scenes: int | None = None, swapped: bool = False) -> Task:
    """Scenes of RSSCN7; of the training split as many as asked for."""
    names = {split: np.array(read_split(data, split)) for split in SPLITS}
    kinds = sorted({name.partition("/")[0] for split in SPLITS for name in names[split]})
    classes = {split: np.array([kinds.index(name.partition("/")[0]) for name in names[split]]) for split in SPLITS}
    read = {split: np.arange(len(names[split])) for split in SPLITS}
    if train_scenes is not None:
        read["train"] = _of_each_class(classes["train"], train_scenes // len(kinds), 0)
    source = {split: split for split in SPLITS}
    if swapped:
        left = np.setdiff1d(np.arange(len(names["train"])), read["train"])
        if not len(left):
            raise SystemExit("All training scenes are read, expected some to be left to test: give fewer --train-scenes.")
        source = {"train": "test", "val": "train", "test": "train"}
        read = {"train": read["test"], "val": read["train"], "test": left}
    images, labels, places = {}, {}, {}
    for split in SPLITS:
        chosen, known = names[source[split]][read[split]], classes[source[split]][read[split]]
        pixels = np.stack([_read_jpeg(data / f"{name}.jpg", size) for name in chosen])
        images[split] = _normalize(pixels.transpose(0, 3, 1, 2) / 255, *PIXELS)
        labels[split], places[split] = known[:, None], chosen
    return Task(SCENES, len(kinds), images, labels, places, (14, 70, 700))


def draw(task: Task, labels: int, seed: int) -> NDArray[np.int64]:
    """Training images that have labels, in order: as many of each class for scenes, any tiles otherwise."""
    classes = task.labels["train"][:, 0]
    if task.scenes:
        return _of_each_class(classes, labels // task.classes, seed)
    return np.sort(np.random.default_rng(seed).permutation(len(classes))[:labels])


def _of_each_class(classes: NDArray[np.int64], each: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(classes == one))[:each] for one in np.unique(classes)]))


def _read_jpeg(path: Path, size: int) -> NDArray[np.float32]:
    return np.asarray(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC), np.float32)


def _read(path: Path, size: int, bands: list[int], how: Resampling) -> NDArray[np.float32]:
    with rasterio.open(path) as source:
        pixels: NDArray[np.float32] = source.read(bands, out_shape=(len(bands), size, size), resampling=how).astype(
            np.float32
        )
        return pixels


def _normalize(pixels: NDArray[np.float32], mean: NDArray[Any], std: NDArray[Any]) -> Tensor:
    return torch.from_numpy(((pixels - mean[:, None, None]) / std[:, None, None]).astype(np.float32))
