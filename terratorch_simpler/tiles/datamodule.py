"""The datamodule's images: by default without labels, without augmentation, normalised as the model is used to."""

from __future__ import annotations

import contextlib
import copy
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from albumentations import BaseCompose
from lightning.pytorch import LightningDataModule
from terratorch.datasets.transforms import MultimodalToTensor, MultimodalTransforms
from terratorch.datasets.utils import default_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.tiles.source import Batch, Share, Skip, Skipped, file_size, fingerprint

LABEL_KEYS = frozenset({"mask", "label", "labels", "filename", "bbox_xyxy", "boxes", "masks", "crs", "bounds"})
"""Keys that TerraTorch's tasks do not hand to the model."""

DEFAULT_BATCH_SIZE = 16
MAX_BAD_FRACTION = 0.1


Split = Literal["train", "val"]


class DatamoduleTiles:
    """Streams a datamodule's images in a seeded order.

    The dataset, the datamodule and its loaders stay untouched: copies of the dataset are read. Without ``labels``, masks
    and labels are not read from disk where the dataset can do without them (TerraTorch's generic datasets), and never
    used elsewhere.

    Args:
        datamodule: A datamodule that has been set up for fit.
        seed: Seed of the order.
        split: Training or validation images.
        labels: Whether batches hold the masks or labels as well, under ``target``, if the dataset has any.

    Raises:
        ConfigurationError: If the datamodule has no such dataset.
    """

    def __init__(self, datamodule: LightningDataModule, seed: int = 0, split: Split = "train", labels: bool = False) -> None:
        """Copy the dataset and draw the order."""
        dataset = _dataset_of(datamodule, split)
        if dataset is None:
            remedy = "set its roots in the datamodule" if labels else "give the callback tiles of its own"
            msg = f"Found no {split}_dataset in {type(datamodule).__name__}, expected one after setup('fit'): {remedy}."
            raise ConfigurationError(msg)
        self._dataset = dataset
        self._images = _Images(dataset, _plain_transform(datamodule), labels)
        self._order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self._batch_size = int(getattr(datamodule, "batch_size", None) or DEFAULT_BATCH_SIZE)
        self._num_workers = int(getattr(datamodule, "num_workers", 0) or 0)
        self._name = type(datamodule).__name__
        self._share = Share()
        self.skips = self.no_skips()
        self.pin_memory = False
        self.on_skip: Callable[[Skip], None] | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """How many images could not be used in the last pass, by reason."""
        return dict(self.skips.counts)

    def __len__(self) -> int:
        """Training images, of this share if it is one."""
        return len(self._share.positions(len(self._order)))

    def describe(self) -> dict[str, Any]:
        """Kind, number of images, and a fingerprint of their names, sizes and order."""
        total = len(self._order)
        files = [_file(self._dataset, index) for index in range(total)]
        named = [(file.rpartition("/")[2], file_size(file)) for file in files]
        return {
            "source": self._name,
            "tiles": total,
            "fingerprint": fingerprint([*named, total, self._order]),
        }

    def shard(self, num_shards: int, index: int, block: int = 1, start: int = 0) -> DatamoduleTiles:
        """One of several disjoint shares of the same stream, for processes that read together.

        Args:
            num_shards: Number of shares.
            index: Which of them, from 0.
            block: Neighbours that go to the same share.
            start: Images at the start of the stream that no share reads.

        Raises:
            TilesError: If there is no such share.
        """
        share = copy.copy(self)
        share._share = Share(num_shards, index, block, start)
        return share

    def no_skips(self) -> Skipped:
        """The count of a pass over all images, before it begins."""
        return Skipped(len(self._order), MAX_BAD_FRACTION)

    def __iter__(self) -> Iterator[Batch]:
        """Stream batches of images of equal size.

        Raises:
            TilesError: If too many images are unreadable.
        """
        self.skips = self.no_skips()
        loader = DataLoader(
            _InOrder(self._images, self._order, self._share.positions(len(self._order)).tolist()),
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            collate_fn=_stackable,
            pin_memory=self.pin_memory,
        )
        for batches, unusable in loader:
            for skip in unusable:
                self.skips.add(skip)
                if self.on_skip is not None:
                    self.on_skip(skip)
            yield from batches


def _dataset_of(datamodule: LightningDataModule, split: Split) -> Any:
    dataset: Any = getattr(datamodule, f"{split}_dataset", None)
    if dataset is None and split == "train":
        dataset = getattr(datamodule, "dataset", None)
    if dataset is None and hasattr(datamodule, f"{split}_dataloader"):
        with contextlib.suppress(Exception):  # its data may be missing, which is said in our own words
            # Sen4Map names its datasets otherwise.
            dataset = getattr(getattr(datamodule, f"{split}_dataloader")(), "dataset", None)
    return dataset


class _Images(Dataset[dict[str, Any]]):
    """Samples with a mask of valid pixels; their labels, if wanted, under ``target``."""

    def __init__(self, dataset: Dataset[Any], transform: Callable[..., Any] | None, labels: bool) -> None:
        plain = _with(dataset, **({} if transform is None else {"transform": transform, "transforms": transform}))
        self._plain = plain if labels and _has_labels(dataset) else _without_labels(plain)
        self._labels = labels
        # TerraTorch fills nodata while reading, after which it cannot be told from data; a second copy leaves it NaN.
        self._gaps = _with(self._plain, no_data_replace=None)

    def __len__(self) -> int:
        return len(self._plain)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            sample = self._gaps[index]
            valid = _finite(sample["image"])
            if valid.ndim < 2 or not valid.numel():
                raise OSError("no pixels")  # tifffile reads a truncated file as an empty array
            if not valid.all():
                sample = self._plain[index]
        except Exception as err:  # readers of damaged files raise anything: struct.error, TypeError, ZeroDivisionError, ...
            why = textwrap.shorten(str(err), 100) or type(err).__name__
            return {"unusable": ("unreadable", f"{_file(self._plain, index)}: {why}", True)}
        if not valid.any():
            return {"unusable": ("nodata", _file(self._plain, index), False)}
        if not _finite(sample["image"]).all():
            # Without no_data_replace the NaN would spread to every token of the tile.
            return {"unusable": ("NaN without no_data_replace", _file(self._plain, index), False)}
        inputs = {key: value for key, value in sample.items() if key not in LABEL_KEYS}
        found = [sample[key] for key in ("label", "mask") if self._labels and key in sample]
        target = {"target": found[0]} if found else {}
        return {**inputs, **target, "valid": valid, "index": index}


class _InOrder(Dataset[dict[str, Any]]):
    """Samples of some positions of the stream."""

    def __init__(self, images: _Images, order: Sequence[int], positions: Sequence[int]) -> None:
        self._images = images
        self._order = order
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, number: int) -> dict[str, Any]:
        position = self._positions[number]
        sample = self._images[self._order[position]]
        if "unusable" in sample:
            return {"unusable": Skip(position, *sample["unusable"])}
        return {**sample, "position": position}


def _file(dataset: Dataset[Any], index: int) -> str:
    """Path of an image, or its number where the dataset does not list its files."""
    while isinstance(dataset, Subset):
        index, dataset = dataset.indices[index], dataset.dataset
    if samples := _samples_by_modality(dataset):
        return str(next(iter(samples[index].values())))
    for name in ("image_files", "image_filenames"):
        files = getattr(dataset, name, None)
        if isinstance(files, list):
            return str(files[index])
    return f"image {index}"


def _samples_by_modality(dataset: Dataset[Any]) -> list[dict[str, Any]]:
    """What TerraTorch's datasets of modalities read for each sample; empty for others."""
    samples = getattr(dataset, "samples", None)
    return samples if isinstance(samples, list) and samples and isinstance(samples[0], dict) else []


def _finite(image: Tensor | dict[str, Tensor]) -> Tensor:
    """Where all bands are finite: (H, W), or (T, H, W) for a time series."""
    if isinstance(image, dict):
        # Text and single numbers have no pixels.
        masks = [_finite(part) for part in image.values() if isinstance(part, Tensor) and part.ndim >= 3]
        same = all(mask.shape == masks[0].shape for mask in masks)
        # Modalities on different grids have no common mask; a gap in one makes the whole tile suspect.
        return torch.stack(masks).all(dim=0) if same else torch.stack([mask.all() for mask in masks]).all()[None, None]
    return torch.isfinite(image).all(dim=0)


def _with(dataset: Dataset[Any], **attributes: object) -> Dataset[Any]:
    """A shallow copy, of the whole dataset below a subset, with those of the attributes replaced that it has."""
    if isinstance(dataset, Subset):
        return Subset(_with(dataset.dataset, **attributes), dataset.indices)
    changed = copy.copy(dataset)
    for name, value in attributes.items():
        if hasattr(changed, name):
            setattr(changed, name, value)
    return changed


def _has_labels(dataset: Dataset[Any]) -> bool:
    """Whether the masks are not the images once more, which TerraTorch takes where it finds none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    masks = getattr(dataset, "segmentation_mask_files", None)
    return masks is None or masks != getattr(dataset, "image_files", None)


def _without_labels(dataset: Dataset[Any]) -> Dataset[Any]:
    plain = _with(dataset, segmentation_mask_files=[], require_label=False)
    if samples := _samples_by_modality(dataset):  # the mask is among them
        unlabeled = [{key: value for key, value in sample.items() if key != "mask"} for sample in samples]
        return _with(plain, samples=unlabeled, scalar_label=False)
    return plain


def _plain_transform(datamodule: LightningDataModule) -> Callable[..., Any] | None:
    """The transform of evaluation, which has no random part; None if the datamodule does not say."""
    if not hasattr(datamodule, "train_transform"):
        return None
    names = ("test_transform", "val_transform")
    given = next((getattr(datamodule, name) for name in names if getattr(datamodule, name, None) is not None), None)
    if isinstance(getattr(datamodule, "modalities", None), list):
        return _for_modalities(datamodule, given)
    return default_transform if given is None else given  # type: ignore[no-any-return]


def _for_modalities(datamodule: Any, transform: Any) -> Callable[..., Any]:
    """A transform of images by modality, as TerraTorch's datasets build it from the datamodule's."""
    modalities: list[str] = datamodule.modalities
    if isinstance(transform, dict) and any(transform.values()):
        return MultimodalTransforms(  # type: ignore[no-any-return]
            {name: transform.get(name) or default_transform for name in modalities}, shared=False
        )
    if isinstance(transform, BaseCompose):
        others = [name for name in datamodule.non_image_modalities if name != "label"]
        return MultimodalTransforms(transform, non_image_modalities=others)  # type: ignore[no-any-return]
    return MultimodalToTensor(modalities)  # type: ignore[no-any-return]


def _stackable(samples: Sequence[dict[str, Any]]) -> tuple[list[Batch], list[Skip]]:
    """Collate neighbours of equal shape, in order; tiles of unequal size become batches of their own."""
    unusable = [sample["unusable"] for sample in samples if "unusable" in sample]
    runs: list[list[dict[str, Any]]] = []
    for sample in samples:
        if "unusable" in sample:
            continue
        if runs and _shapes(runs[-1][0]) == _shapes(sample):
            runs[-1].append(sample)
        else:
            runs.append([sample])
    return [_collate(run) for run in runs], unusable


def _shapes(sample: dict[str, Any]) -> object:
    image = sample["image"]
    return {k: getattr(v, "shape", None) for k, v in image.items()} if isinstance(image, dict) else image.shape


def _collate(run: Sequence[dict[str, Any]]) -> Batch:
    numbers = ("index", "position")
    inputs = default_collate([{key: value for key, value in sample.items() if key not in numbers} for sample in run])
    return {**inputs, **{name: [sample[name] for sample in run] for name in numbers}}
