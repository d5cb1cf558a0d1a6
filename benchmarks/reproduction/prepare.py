"""Bring downloaded data into the layout of configs/README.md.

    python -m benchmarks.reproduction.prepare mados MADOS DATA
    python -m benchmarks.reproduction.prepare cifar100 FOLDER DATA

MADOS: the unpacked archive, with ``Scene_*/{10,20,60}`` and ``splits``. CIFAR-100: the folder that holds the unpacked
``cifar-100-python``; every tenth training image of a class becomes validation.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import Resampling
from torchvision.datasets import CIFAR100

BANDS = 11
REFLECTANCE = 10_000
EVERY = 10


def prepare_mados(source: Path, target: Path) -> None:
    """Stack the bands of every crop at 10 m into one GeoTIFF, reflectance x 10,000, and copy masks and splits.

    Args:
        source: The unpacked archive.
        target: Folder to make ``mados`` in.

    Raises:
        ValueError: If a crop has not eleven bands.
    """
    for name in ("images", "masks", "splits"):
        (target / "mados" / name).mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        names = (source / "splits" / f"{split}_X.txt").read_text(encoding="utf-8").split()
        # TerraTorch looks for a line anywhere in a file's name: without the last underscore Scene_1_1 would take Scene_1_10.
        (target / "mados/splits" / f"{split}.txt").write_text("".join(f"{name}_\n" for name in names), encoding="utf-8")
        for name in names:
            scene, _, crop = name.rpartition("_")
            bands = sorted(source.glob(f"{scene}/*/{scene}_L2R_rhorc_*_{crop}.tif"), key=_wavelength)
            if len(bands) != BANDS:
                msg = f"Found {len(bands)} bands of {name} in {source / scene}, expected {BANDS}: unpack the archive again."
                raise ValueError(msg)
            with rasterio.open(source / scene / "10" / f"{scene}_L2R_cl_{crop}.tif") as mask:
                labels, profile = mask.read(1), mask.profile
            image = np.stack([_at_10m(band, labels.shape) for band in bands])
            profile.update(driver="GTiff", count=BANDS, dtype="float32", nodata=None)
            with rasterio.open(target / "mados/images" / f"{name}_image.tif", "w", **profile) as file:
                file.write(REFLECTANCE * image)
            profile.update(count=1, dtype="uint8")
            with rasterio.open(target / "mados/masks" / f"{name}_mask.tif", "w", **profile) as file:
                file.write(labels.astype(np.uint8), 1)


def _wavelength(path: Path) -> int:
    return int(path.stem.split("_")[-2])


def _at_10m(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    with rasterio.open(path) as band:
        pixels: np.ndarray = band.read(1, out_shape=shape, resampling=Resampling.nearest, out_dtype="float32")
    return pixels


def prepare_cifar100(source: Path, target: Path) -> None:
    """Write every image as PNG below the name of its class.

    Args:
        source: Folder that holds ``cifar-100-python``.
        target: Folder to make ``cifar100`` in.
    """
    for train in (True, False):
        images = CIFAR100(str(source), train=train)
        seen: Counter[int] = Counter()
        for number, (image, label) in enumerate(images):
            seen[label] += 1
            split = "test" if not train else "val" if seen[label] % EVERY == 0 else "train"
            folder = target / "cifar100" / split / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number:05d}.png")


PREPARE: dict[str, Callable[[Path, Path], None]] = {"mados": prepare_mados, "cifar100": prepare_cifar100}


def main(args: Sequence[str] | None = None) -> None:
    """Prepare one data set.

    Args:
        args: Arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduction.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", choices=PREPARE)
    parser.add_argument("source", type=Path, help="what was downloaded, unpacked")
    parser.add_argument("target", type=Path, help="the --data_root of benchmarks.reproduction")
    options = parser.parse_args(args)
    try:
        PREPARE[options.data](options.source, options.target)
    except (OSError, RuntimeError, ValueError) as err:
        sys.exit(f"prepare {options.data}: {err}")


if __name__ == "__main__":
    main()
