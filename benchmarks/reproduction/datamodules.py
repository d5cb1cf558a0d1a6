"""Data that TerraTorch cannot read by itself: BigEarthNet v2, and Sen4Map where h5py compares no dataset with a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import h5py
import numpy as np
import torchgeo.datasets
from numpy.typing import NDArray
from terratorch.datamodules import Sen4MapLucasDataModule
from terratorch.datamodules.geobench_data_module import GeobenchDataModule
from terratorch.datamodules.m_bigearthnet import MEANS, STDS
from terratorch.datasets.utils import default_transform
from torch import Tensor
from torch.utils.data import DataLoader


class BigEarthNetV2(torchgeo.datasets.BigEarthNetV2):
    """Sentinel-2 of BigEarthNet v2 with its 19 labels; Sentinel-1 and the reference maps need not be there.

    Args:
        split: "train", "val" or "test".
        data_root: Folder with ``BigEarthNet-S2`` and ``metadata.parquet``.
        bands: Names of the bands to return, in order.
        transform: Called with the image, channels last, by name.
        partition: Not used; other datasets of this kind have several.
    """

    all_band_names = tuple(MEANS)
    metadata_locs = {name: torchgeo.datasets.BigEarthNetV2.metadata_locs[name] for name in ("s2", "metadata")}  # noqa: RUF012

    def __init__(
        self,
        split: str,
        data_root: str,
        bands: Sequence[str],
        transform: Callable[..., dict[str, Any]] | None = None,
        partition: str = "default",  # noqa: ARG002
    ) -> None:
        super().__init__(data_root, split, bands="s2")
        self.band_indices = [self.all_band_names.index(band) for band in bands]
        self.transform = transform or default_transform

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One patch of 120 px and its labels."""
        image = self._load_image(index, "s2")[self.band_indices].permute(1, 2, 0).numpy()
        return {**self.transform(image=image), "label": self._load_target(index)}


class BigEarthNetV2DataModule(GeobenchDataModule):
    """BigEarthNet v2 with the settings and statistics of TerraTorch's m-bigearthnet, which is a part of v1.

    Args:
        batch_size: Patches in a batch.
        num_workers: Processes that read.
        data_root: Folder with ``BigEarthNet-S2`` and ``metadata.parquet``.
        bands: Names of the bands to use.
        train_transform: Of TerraTorch's kind, as for m-bigearthnet.
        val_transform: The same.
        test_transform: The same.
    """

    def __init__(
        self,
        batch_size: int = 8,
        num_workers: int = 0,
        data_root: str = "./",
        bands: Sequence[str] | None = None,
        train_transform: list[Any] | None = None,
        val_transform: list[Any] | None = None,
        test_transform: list[Any] | None = None,
    ) -> None:
        super().__init__(
            BigEarthNetV2,
            MEANS,
            STDS,
            batch_size=batch_size,
            num_workers=num_workers,
            data_root=data_root,
            bands=bands,
            train_transform=train_transform,
            val_transform=val_transform,
            test_transform=test_transform,
        )


class Sen4MapDataModule(Sen4MapLucasDataModule):
    """TerraTorch's Sen4Map, with arrays where its dataset expects them."""

    # Not in setup: the parser of command lines would no longer see which settings reach the dataset.

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Training points."""
        return _with_arrays(super().train_dataloader())

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Validation points."""
        return _with_arrays(super().val_dataloader())

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Test points."""
        return _with_arrays(super().test_dataloader())


def _with_arrays(loader: DataLoader[dict[str, Tensor]]) -> DataLoader[dict[str, Tensor]]:
    dataset: Any = loader.dataset
    if isinstance(dataset.h5data, h5py.File):
        dataset.h5data = _Groups(dataset.h5data)
    return loader


class _Groups:
    """Groups of a file by name."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file

    def __getitem__(self, name: str) -> _Arrays:
        return _Arrays(self._file[name])


class _Arrays:
    """A group whose datasets are read when they are asked for."""

    def __init__(self, group: h5py.Group) -> None:
        self._group = group
        self.attrs = group.attrs

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        values: NDArray[np.generic] = self._group[name][()]
        return values
