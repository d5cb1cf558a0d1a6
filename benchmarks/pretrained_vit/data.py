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
        masks: Class of every pixel (N, size, size), or of every image (N,).
        labels: Class of every patch (N, P), or of every image (N, 1), with ``IGNORED`` where there is none.
        places: What is resampled: the place of every image, (N,).
        labelled: How many training images are labelled, one case each.
    """

    name: str
    classes: int
    images: dict[str, Tensor]
    masks: dict[str, NDArray[np.int64]]
    labels: dict[str, NDArray[np.int64]]
    places: dict[str, NDArray[np.str_]]
    labelled: tuple[int, ...]

    @property
    def scenes(self) -> bool:
        """Whether images have one label each, so that the score is accuracy; otherwise it is mean IoU."""
        return self.name == SCENES


def read_task(data: Path, name: str, size: int, patch: int) -> Task:
    """One of ``TASKS`` from the folder that holds ``hls_water`` and ``rsscn7``.

    Raises:
        SystemExit: If the folder is missing.
    """
    folder = data / ("rsscn7" if name == SCENES else "hls_water")
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}, expected the data of task {name}: give the folder that holds it.")
    return rsscn7(folder, size) if name == SCENES else hls(folder, name, size, patch)


def hls(data: Path, target: str, size: int, patch: int) -> Task:
    """Land cover ("cover") or water of HLS tiles, by the majority of each patch."""
    folder = {"cover": "landcover/{}_landcover.tif", "water": "water_mask/{}_mask.tif"}[target]
    codes = list(COVER) if target == "cover" else [0, 1]
    with (data / "tiles.csv").open() as file:
        site = {row["tile"]: row["site_group"] for row in csv.DictReader(file)}
    pixels, masks, labels, places = {}, {}, {}, {}
    for split in SPLITS:
        names = read_split(data, split)
        read = [_read(data / f"images/{name}_image.tif", size, RGB, Resampling.bilinear) for name in names]
        pixels[split] = np.stack(read)
        mask = np.stack([_read(data / folder.format(name), size, [1], Resampling.nearest)[0] for name in names])
        masks[split] = np.select([mask == code for code in codes], range(len(codes)), IGNORED)
        labels[split] = majority(torch.from_numpy(masks[split]), (patch, patch)).flatten(1).numpy()
        places[split] = np.array([site[name] for name in names])
    mean, std = pixels["train"].mean((0, 2, 3)), pixels["train"].std((0, 2, 3))
    images = {split: _normalize(values, mean, std) for split, values in pixels.items()}
    return Task(target, len(codes), images, masks, labels, places, (16, 68))


def rsscn7(data: Path, size: int) -> Task:
    """Scenes of RSSCN7."""
    images, labels, places = {}, {}, {}
    for split in SPLITS:
        names = read_split(data, split)
        kinds = sorted({name.partition("/")[0] for name in names})
        read = [
            np.asarray(
                Image.open(data / f"{name}.jpg").convert("RGB").resize((size, size), Image.Resampling.BICUBIC), np.float32
            )
            for name in names
        ]
        images[split] = _normalize(np.stack(read).transpose(0, 3, 1, 2) / 255, *PIXELS)
        labels[split] = np.array([[kinds.index(name.partition("/")[0])] for name in names])
        places[split] = np.array(names)
    masks = {split: label[:, 0] for split, label in labels.items()}
    return Task(SCENES, len(kinds), images, masks, labels, places, (14, 70, 700))


def draw(task: Task, labels: int, seed: int) -> NDArray[np.int64]:
    """Training images that have labels, in order: as many of each class for scenes, any tiles otherwise."""
    rng = np.random.default_rng(seed)
    classes = task.labels["train"][:, 0]
    if not task.scenes:
        return np.sort(rng.permutation(len(classes))[:labels])
    each = labels // task.classes
    chosen = [rng.permutation(np.flatnonzero(classes == number))[:each] for number in range(task.classes)]
    return np.sort(np.concatenate(chosen))


def _read(path: Path, size: int, bands: list[int], how: Resampling) -> NDArray[np.float32]:
    with rasterio.open(path) as source:
        pixels: NDArray[np.float32] = source.read(bands, out_shape=(len(bands), size, size), resampling=how).astype(
            np.float32
        )
        return pixels


def _normalize(pixels: NDArray[np.float32], mean: NDArray[Any], std: NDArray[Any]) -> Tensor:
    return torch.from_numpy(((pixels - mean[:, None, None]) / std[:, None, None]).astype(np.float32))
