"""Tiles and labels as a set-up asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling

BANDS = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]
COVER = {10: "trees", 30: "grass", 40: "crop", 80: "water"}
"""Codes of ESA WorldCover that hold at least a twentieth of the pixels. With shrub (3 %) and built-up (2 %) as classes
of their own, encoders fine-tuned with few labels found neither, which hid a third of every difference."""
IGNORED = -1


class Setup(NamedTuple):
    """One way to fine-tune.

    Attributes:
        name: Its name.
        target: "cover" (land cover) or "water".
        labels: Labelled training tiles.
        size: Side of the tiles in pixels; those of 128 px are enlarged.
        freeze: Whether only the decoder is trained.
        decoder: "pointwise" (the head alone, on every patch), "linear", "unet", or "probe": nothing is trained but a
            logistic regression on the features of patches.
        epochs: Epochs, 0 for a probe.
        lr: Learning rate of AdamW.
    """

    name: str
    target: str
    labels: int
    size: int
    freeze: bool
    decoder: str
    epochs: int
    lr: float

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(COVER.values()) if self.target == "cover" else ["land", "water"]


def prepare(data: Path, folder: Path, target: str, size: int) -> Path:
    """Write the tiles of all splits with labels that TerraTorch reads, unless that was done.

    Args:
        data: Folder ``hls_water``.
        folder: Where to.
        target: "cover" or "water".
        size: Side in pixels.

    Returns:
        A folder with ``images`` and ``masks``.
    """
    root = folder / f"{target}-{size}"
    done = root / "done"
    if done.exists():
        return root
    source = {"cover": "landcover/{}_landcover.tif", "water": "water_mask/{}_mask.tif"}[target]
    for name in [name for split in ("train", "val", "test") for name in read_split(data, split)]:
        image = _read(data / f"images/{name}_image.tif", size, Resampling.bilinear)
        mask = _read(data / source.format(name), size, Resampling.nearest)[0].astype(np.int16)
        if target == "cover":
            mask = np.select([mask == code for code in COVER], range(len(COVER)), IGNORED).astype(np.int16)
        _write(root / f"images/{name}_image.tif", image)
        _write(root / f"masks/{name}_mask.tif", mask[None])
    done.touch()
    return root


def read_split(data: Path, split: str) -> list[str]:
    """Ids of the tiles of a split, as the data set has them: no place is in two splits."""
    return (data / f"splits/{split}.txt").read_text().split()


def encoder_weights(study: dict[str, Any], name: str, folder: Path) -> Path:
    """The file of an encoder's weights: one that is given, or the place in the study's folder for those it trains itself."""
    encoder = study["encoders"][name]
    return Path(encoder.get("weights") or folder / f"encoders/{name}-{encoder['steps']}.pt")


def labelled(data: Path, labels: int, seed: int) -> list[str]:
    """Ids of the training tiles that have labels, drawn by the seed."""
    names = read_split(data, "train")
    order = np.random.default_rng(seed).permutation(len(names))
    return [names[i] for i in order[:labels]]


def datamodule_args(data: Path, root: Path, folder: Path, setup: Setup, seed: int, study: dict[str, Any]) -> dict[str, Any]:
    """Arguments of TerraTorch's generic datamodule.

    Args:
        data: Folder ``hls_water``.
        root: What :func:`prepare` returned.
        folder: For the list of labelled tiles.
        setup: The set-up.
        seed: Of the labels that are drawn.
        study: The study's settings.
    """
    chosen = folder / f"labels-{setup.labels}-{seed}.txt"
    chosen.parent.mkdir(parents=True, exist_ok=True)
    chosen.write_text("\n".join(labelled(data, setup.labels, seed)))
    splits = {"train": chosen, "val": data / "splits/val.txt", "test": data / "splits/test.txt"}
    paths = {f"{split}_split": path for split, path in splits.items()}
    paths |= {f"{split}_data_root": root / "images" for split in splits}
    paths |= {f"{split}_label_data_root": root / "masks" for split in splits}
    return {
        **paths,
        "batch_size": study["batch_size"],
        "num_workers": 0,  # small files: a process of its own would cost more than reading them
        "num_classes": len(setup.classes),
        "img_grep": "*_image.tif",
        "label_grep": "*_mask.tif",
        "dataset_bands": BANDS,
        "output_bands": BANDS,
        "rgb_indices": [2, 1, 0],
        "no_data_replace": 0,
        "no_label_replace": IGNORED,
        "means": study["means"],
        "stds": study["stds"],
    }


def _read(path: Path, size: int, how: Resampling) -> NDArray[Any]:
    with rasterio.open(path) as source:
        pixels: NDArray[Any] = source.read(out_shape=(source.count, size, size), resampling=how)
        return pixels


def _write(path: Path, pixels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": pixels.dtype}
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels)
