"""The images of a datamodule: by default without labels or augmentation, with the transform of evaluation."""

from __future__ import annotations

import copy
import itertools
import os
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
import torch
from albumentations import BaseCompose
from lightning.pytorch import LightningDataModule
from terratorch.datamodules import TilingDataModuleWrapper
from terratorch.datasets.tiled_dataset_wrapper import TiledDataset
from terratorch.datasets.transforms import MultimodalToTensor, MultimodalTransforms
from terratorch.datasets.utils import default_transform
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate, get_worker_info
from torchgeo.datasets import GeoDataset

from terratorch_simpler.data.augmentation import DeterministicDataset, seeded
from terratorch_simpler.data.failures import is_damage
from terratorch_simpler.data.source import Batch, FileStat, Shard, Skip, SkipCounter, file_stat, fingerprint
from terratorch_simpler.errors import ConfigurationError, TilesError
from terratorch_simpler.logger import log

NOT_INPUTS = frozenset(
    {
        *("mask", "label", "labels", "filename", "bbox_xyxy", "boxes", "masks", "image_id"),
        *("crs", "bounds", "tile_coords", "base_idx"),
    }
)
"""Keys that TerraTorch's tasks do not pass to the model, or that no model takes."""

DEFAULT_BATCH_SIZE = 16
MAX_BAD_FRACTION = 0.1
TRIED_FIRST = 8
"""Samples that are tried to see how the dataset can be read: the first ones may be damaged."""

OTHER_TILES = "give the callback tiles of its own"

Split = Literal["train", "val"]
SPLIT_NAMES = {"train": "training images", "val": "validation images"}


class DatamoduleTiles:
    """Streams a datamodule's images in a seeded order.

    The dataset, the datamodule, its loaders and the random state of the process stay as they are: copies of the dataset are
    read. Without ``labels``, masks and labels are read from disk only if the dataset cannot do without them, and never used.
    Images get the transform of evaluation. If a dataset has none, its random transforms are disabled; those that images need
    to fit into a batch are seeded with the number of the image.

    Args:
        datamodule: A datamodule that has been set up for fit.
        seed: Seed of the order.
        split: Training or validation images.
        labels: Whether batches contain the masks or labels as well, under ``target``, if the dataset has any.

    Raises:
        ConfigurationError: If the datamodule has no such dataset, it is empty, or its samples are no images by number.
        TilesError: If the dataset or a transform fails on every image for another reason than damage.
    """

    def __init__(self, datamodule: LightningDataModule, seed: int = 0, split: Split = "train", labels: bool = False) -> None:
        self._name = type(datamodule).__name__
        self.band_names = band_names(datamodule)
        self._split: Split = split
        self._dataset = _dataset_of(datamodule, split, labels)
        _check_dataset(datamodule, self._dataset, split)
        self._order = torch.randperm(len(self._dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self._images = _Images(self._dataset, _evaluation_transforms(datamodule, self._dataset), labels, self._name)
        self._images.check_samples(self._order[:TRIED_FIRST])
        self._batch_size = int(getattr(datamodule, "batch_size", None) or DEFAULT_BATCH_SIZE)
        self._num_workers = int(getattr(datamodule, "num_workers", 0) or 0)
        self._shard = Shard()
        self._stats: list[list[FileStat]] | None = None
        self.skips = self.new_skip_counter()
        self.pin_memory = False
        self.on_skip: Callable[[Skip], None] | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """Images skipped in the last pass, by reason."""
        return dict(self.skips.counts)

    def __len__(self) -> int:
        """Images, of this shard if it is one."""
        return len(self._shard.positions(len(self._order)))

    def describe(self) -> dict[str, Any]:
        """Kind, number of images, and a fingerprint of their names, sizes and order."""
        total = len(self._order)
        named = [[(stat.name, stat.size) for stat in stats] for stats in self._file_stats()]
        return {"source": self._name, "tiles": total, "fingerprint": fingerprint([*named, total, self._order])}

    def name_of(self, number: int) -> str:
        """First file of an image, by its number in the dataset; where files are not known, split and number."""
        return next(iter(_files(self._dataset, number)), f"{SPLIT_NAMES[self._split]}, image {number}")

    def modification_fingerprint(self) -> str:
        """A fingerprint of names, sizes and modification times of all files."""
        return fingerprint(stat for stats in self._file_stats() for stat in stats)

    def _file_stats(self) -> list[list[FileStat]]:
        if self._stats is None:
            self._stats = [
                [file_stat(file) for file in _files(self._dataset, index)] or [FileStat(f"image {index}", -1, -1)]
                for index in range(len(self._order))
            ]
        return self._stats

    def shard(self, num_shards: int, index: int, block: int = 1, start: int = 0) -> DatamoduleTiles:
        """One of several disjoint shards of the same stream, for processes that read together.

        Args:
            num_shards: Number of shards.
            index: Which of them, from 0.
            block: Consecutive images that go to the same shard.
            start: Images at the start of the stream that no shard reads.

        Raises:
            TilesError: If there is no such shard.
        """
        tiles = copy.copy(self)
        tiles._shard = Shard(num_shards, index, block, start)
        return tiles

    def new_skip_counter(self) -> SkipCounter:
        """A counter at zero for a pass over all images."""
        return SkipCounter(len(self._order), MAX_BAD_FRACTION)

    def __iter__(self) -> Iterator[Batch]:
        """Stream batches of images of equal size.

        Raises:
            TilesError: If too many images are unreadable, or the dataset or a transform fails.
        """
        self.skips = self.new_skip_counter()
        positions = self._shard.positions(len(self._order)).tolist()
        loader = DataLoader(
            self._images,
            batch_size=self._batch_size,
            sampler=[(self._order[position], position) for position in positions],
            num_workers=self._num_workers,
            collate_fn=_collate_equal_shapes,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else it draws a number from the random state of the process
        )
        none_read = True
        for batches, failures in loader:
            none_read = none_read and not batches
            for failure in failures:
                self._skip(failure, none_read)
            yield from batches

    def _skip(self, failure: _Failure, none_read: bool) -> None:
        if failure.is_bug:
            raise TilesError(failure.message) from failure.error
        try:
            self.skips.add(failure.skip)
        except TilesError as err:
            if none_read and failure.error is not None and not isinstance(failure.error, OSError):
                raise TilesError(failure.message) from failure.error  # what fails on every file is no damage
            raise err from failure.error
        if self.on_skip is not None:
            self.on_skip(failure.skip)


class _Failure(NamedTuple):
    """An image that cannot be used.

    Attributes:
        skip: What to count.
        is_bug: Whether code of the dataset or of a transform failed, on a file that is not damaged.
        message: The error to raise in that case.
        error: What was raised.
    """

    skip: Skip
    is_bug: bool = False
    message: str = ""
    error: Exception | None = None


def _dataset_of(datamodule: LightningDataModule, split: Split, labels: bool) -> Any:
    name = type(datamodule).__name__
    dataset: Any = None
    # The train_dataset of the wrapper is that of the wrapped datamodule, which contains whole images.
    if not isinstance(datamodule, TilingDataModuleWrapper):
        dataset = getattr(datamodule, f"{split}_dataset", None)
        if dataset is None and split == "train":
            dataset = getattr(datamodule, "dataset", None)
    cause: Exception | None = None
    if dataset is None and hasattr(datamodule, f"{split}_dataloader"):
        try:
            with seeded(0):
                # Sen4Map's datasets have other names.
                dataset = getattr(getattr(datamodule, f"{split}_dataloader")(), "dataset", None)
        except Exception as err:  # its data may be missing
            cause = err
    if dataset is None:
        remedy = "set its roots in the datamodule" if labels else OTHER_TILES
        why = "" if cause is None else f" (its {split}_dataloader fails: {_shorten(cause)})"
        msg = f"No {split}_dataset in {name}, expected one after setup('fit'){why}: {remedy}."
        raise ConfigurationError(msg) from cause
    return dataset


def _check_dataset(datamodule: LightningDataModule, dataset: Any, split: Split) -> None:
    name, kind = type(datamodule).__name__, type(dataset).__name__
    if isinstance(dataset, GeoDataset):
        msg = (
            f"{name} samples its {kind} by location, expected images by number: give the callback tiles, a GeoTiffTiles "
            "with the paths of its files."
        )
        raise ConfigurationError(msg)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigurationError(f"{name} iterates over its {kind}, expected images by number: {OTHER_TILES}.")
    if not len(dataset):
        msg = (
            f"No {SPLIT_NAMES[split]} in {name} ({_data_settings(datamodule, dataset, split)}), expected at least one: "
            "change these settings of data."
        )
        raise ConfigurationError(msg)


def _data_settings(datamodule: LightningDataModule, dataset: Any, split: Split) -> str:
    """Data root, glob and split file, as far as the datamodule or the dataset has them."""
    settings = {
        "data root": (f"{split}_data_root", f"{split}_root", "data_root", "root"),
        "glob": ("img_grep", "image_grep"),
        "split file": (f"{split}_split", "split_file"),
    }
    shown = []
    for label, names in settings.items():
        owners = (datamodule, _leaf(dataset))
        value = next((v for o in owners for n in names if (v := getattr(o, n, None)) is not None), None)
        if isinstance(value, dict):  # by modality
            value = ", ".join(f"{key}: {part}" for key, part in value.items())
        if value is not None:
            shown.append(f"{label} {value}")
    return ", ".join(shown) or "no root known"


class _Images(Dataset[dict[str, Any]]):
    """Samples, by (index, position), with a mask of valid pixels and, if wanted, their labels under ``target``.

    Args:
        dataset: The datamodule's; copies of it are read.
        evaluation: Transforms of evaluation by the attribute of the dataset that holds them.
        labels: Whether labels are wanted.
        name: Name of the datamodule.
    """

    def __init__(self, dataset: Dataset[Any], evaluation: dict[str, Any], labels: bool, name: str) -> None:
        self._original = dataset
        self._evaluation = evaluation
        self._labels = labels
        self._name = name
        self._dataset_name = type(_leaf(dataset)).__name__
        self._build(read_labels=labels and _has_labels(dataset))

    def _build(self, read_labels: bool) -> None:
        disabled: list[str] = []

        def prepare(leaf: Any, **more: object) -> DeterministicDataset:
            attributes = {**self._evaluation, **({} if read_labels else _without_labels(leaf)), **more}
            for name, value in attributes.items():
                if hasattr(leaf, name):
                    setattr(leaf, name, value)
            deterministic = DeterministicDataset(leaf)
            disabled.extend(deterministic.disabled)
            return deterministic

        self._filled = _rebuild(self._original, prepare)
        self._disabled = sorted(set(disabled))
        # TerraTorch fills nodata while reading, after which it looks like data; in a second copy it stays NaN.
        self._unfilled = _rebuild(self._original, lambda leaf: prepare(leaf, no_data_replace=None))
        self._fills = any(getattr(leaf, "no_data_replace", None) is not None for leaf in _leaves(self._original))
        self._reads_labels = read_labels

    def check_samples(self, indices: Sequence[int]) -> None:
        """Try samples until one can be read, and read labels if the dataset cannot do without them.

        Raises:
            ConfigurationError: If samples contain no image.
        """
        if self._disabled:
            log.info(f"Random transforms of {self._name} are disabled: {', '.join(self._disabled)}.")
        for index in indices:
            if self._can_read(index):
                return
            if not self._reads_labels:
                self._build(read_labels=True)
                if self._can_read(index):
                    log.info(f"{self._dataset_name} reads no image without its label: labels are read and dropped.")
                    return
                self._build(read_labels=False)

    def _can_read(self, index: int) -> bool:
        try:
            sample = self._unfilled[index]
        except Exception:
            return False
        image = sample.get("image") if isinstance(sample, dict) else None
        if not isinstance(image, Tensor | np.ndarray | dict):
            kind = f"a dict of {sorted(map(str, sample))}" if isinstance(sample, dict) else f"a {type(sample).__name__}"
            msg = (
                f"A sample of {self._name} is {kind}, expected a dict with an image, a tensor or one for each modality, "
                f"under 'image': {OTHER_TILES}."
            )
            raise ConfigurationError(msg)
        if not isinstance(image, dict) and image.ndim < 3 and 0 not in image.shape:
            msg = (
                f"Images of {self._name} have shape {tuple(image.shape)}, like embeddings, expected (channels, height, "
                f"width): {OTHER_TILES}."
            )
            raise ConfigurationError(msg)
        return True

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        index, position = at
        try:
            sample, valid = self._read(index)
        except Exception as err:
            return {"failure": self._failure(index, position, err)}
        # Without no_data_replace the NaN would spread to every token of the tile.
        if not valid.any() or not _finite(sample["image"]).all():
            reason = "NaN without no_data_replace" if valid.any() else "nodata"
            return {"failure": _Failure(Skip(position, reason, self._file(index), bad=False))}
        inputs = {key: value for key, value in sample.items() if key not in NOT_INPUTS}
        targets = [sample[key] for key in ("label", "mask") if self._labels and key in sample]
        target = {"target": targets[0]} if targets else {}
        return {**inputs, **target, "valid": valid, "index": index, "position": position, "path": self._file(index)}

    def _read(self, index: int) -> tuple[dict[str, Any], Tensor]:
        sample = _as_tensors(self._unfilled[index])
        valid = _finite(sample["image"])
        if valid.ndim < 2 or not valid.numel():
            raise OSError("no pixels")  # tifffile reads a truncated file as an empty array
        if self._fills and not valid.all():
            filled = _as_tensors(self._filled[index])
            if not _same_data(sample["image"], filled["image"]):
                raise RuntimeError("the image differs from one read to the next, so that nodata cannot be located")
            sample = filled
        return sample, valid

    def _file(self, index: int) -> str:
        return next(iter(_files(self._original, index)), f"image {index}")

    def _failure(self, index: int, position: int, err: Exception) -> _Failure:
        file, why = self._file(index), _shorten(err)
        frame = traceback.extract_tb(err.__traceback__)[-1]
        message = (
            f"{self._dataset_name} of {self._name} failed on {file} with {type(err).__name__} ({why}) in "
            f"{frame.name} ({os.path.basename(frame.filename)}, line {frame.lineno}), expected an image, since the file is "
            f"not damaged: fix the dataset or its transform, or {OTHER_TILES}."
        )
        is_bug = not is_damage(err, _files(self._original, index))
        if get_worker_info() is not None:  # errors of some types cannot be pickled on the way out of a worker
            err = (OSError if isinstance(err, OSError) else RuntimeError)("".join(traceback.format_exception(err)))
        return _Failure(Skip(position, "unreadable", f"{file}: {why}", bad=True), is_bug, message, err)


def _shorten(err: Exception) -> str:
    return textwrap.shorten(str(err), 100) or type(err).__name__


# Datasets inside of datasets


class _UncachedTiles(Dataset[Any]):
    """Tiles of TerraTorch's TiledDataset without its cache on disk, which stores augmented tiles."""

    def __init__(self, tiled: TiledDataset, images: Dataset[Any]) -> None:
        self._tiled = tiled
        self._images = images

    def __len__(self) -> int:
        return len(self._tiled)

    def __getitem__(self, index: int) -> Any:
        image, *window = self._tiled.tiles[index]
        return self._tiled._extract_tile(self._images[image], *window, image)


def _rebuild(dataset: Dataset[Any], change: Callable[[Any], Dataset[Any]]) -> Dataset[Any]:
    """The same nesting of datasets, with a changed copy of each leaf."""
    if isinstance(dataset, Subset):
        return Subset(_rebuild(dataset.dataset, change), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([_rebuild(part, change) for part in dataset.datasets])
    if isinstance(dataset, TiledDataset):
        return _UncachedTiles(dataset, _rebuild(dataset.base_dataset, change))
    return change(copy.copy(dataset))


def _leaves(dataset: Any) -> list[Any]:
    if isinstance(dataset, ConcatDataset):
        return [leaf for part in dataset.datasets for leaf in _leaves(part)]
    if isinstance(dataset, Subset | TiledDataset):
        return _leaves(dataset.dataset if isinstance(dataset, Subset) else dataset.base_dataset)
    return [dataset]


def _leaf(dataset: Any) -> Any:
    return _leaves(dataset)[0]


def _files(dataset: Any, index: int) -> list[str]:
    """Files of an image, without its labels; empty if the dataset does not list them."""
    if isinstance(dataset, Subset):
        return _files(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        part = next(n for n, end in enumerate(dataset.cumulative_sizes) if index < end)
        return _files(dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0))
    if isinstance(dataset, TiledDataset):
        return _files(dataset.base_dataset, dataset.tiles[index][0])
    if samples := _samples_by_modality(dataset):
        return _paths([value for name, value in samples[index].items() if name not in ("mask", "mask_file")])
    for name in ("image_files", "image_filenames"):
        files = getattr(dataset, name, None)
        if isinstance(files, list | tuple | np.ndarray):
            return _paths(files[index])
    return []


def _paths(value: object) -> list[str]:
    if isinstance(value, list | tuple):
        return [path for part in value for path in _paths(part)]
    return [str(value)] if isinstance(value, str | Path) else []


# What TerraTorch's datasets do with labels, modalities and transforms


def _samples_by_modality(dataset: object) -> list[dict[str, Any]]:
    """The files of each sample of TerraTorch's multimodal datasets; empty for others."""
    samples = getattr(dataset, "samples", None)
    return samples if isinstance(samples, list) and samples and isinstance(samples[0], dict) else []


def _has_labels(dataset: Dataset[Any]) -> bool:
    leaf = _leaf(dataset)
    masks = getattr(leaf, "segmentation_mask_files", None)
    return masks is None or masks != getattr(leaf, "image_files", None)  # TerraTorch lists the images if it finds no masks


def _without_labels(dataset: object) -> dict[str, Any]:
    """Attributes that keep TerraTorch's generic datasets from reading labels."""
    attributes: dict[str, Any] = {"segmentation_mask_files": [], "require_label": False}
    if samples := _samples_by_modality(dataset):  # the mask is one of the files
        unlabeled = [{key: value for key, value in sample.items() if key != "mask"} for sample in samples]
        attributes |= {"samples": unlabeled, "scalar_label": False}
    return attributes


def _evaluation_transforms(datamodule: LightningDataModule, dataset: Dataset[Any]) -> dict[str, Any]:
    """Transforms of evaluation by the attribute that holds them; empty if the datamodule has none.

    Taken from the validation dataset if possible: its class has completed them with its own defaults.
    """
    leaf = _leaf(dataset)
    names = [name for name in ("transform", "transforms") if hasattr(leaf, name)]
    given = getattr(datamodule, "test_transform", None)
    if _is_given(given) and not _is_given(getattr(datamodule, "val_transform", None)):
        return dict.fromkeys(names, _for_modalities(leaf, given))
    validation = getattr(datamodule, "val_dataset", None)
    validation = None if validation is None else _leaf(validation)
    if validation is not leaf and type(validation) is type(leaf):
        return {name: getattr(validation, name) for name in names}
    if hasattr(datamodule, "train_transform"):
        return dict.fromkeys(names, _for_modalities(leaf, None))
    return {}


def _is_given(transform: object) -> bool:
    return any(transform.values()) if isinstance(transform, dict) else transform is not None


def _for_modalities(dataset: Any, transform: Any) -> Callable[..., Any]:
    """The datamodule's transform as TerraTorch's datasets wrap it."""
    modalities = getattr(dataset, "modalities", None)
    if not isinstance(modalities, list):
        return default_transform if transform is None else transform  # type: ignore[no-any-return]
    if isinstance(transform, dict):
        return MultimodalTransforms(  # type: ignore[no-any-return]
            {name: transform.get(name) or default_transform for name in modalities}, shared=False
        )
    if isinstance(transform, BaseCompose):
        others = [name for name in getattr(dataset, "non_image_modalities", ()) if name != "label"]
        return MultimodalTransforms(transform, non_image_modalities=others)  # type: ignore[no-any-return]
    return MultimodalToTensor(modalities)  # type: ignore[no-any-return]


# Images, tensors or a dict of them by modality


def _as_tensors(sample: dict[str, Any]) -> dict[str, Any]:
    image = sample["image"]
    if isinstance(image, np.ndarray):
        return {**sample, "image": torch.from_numpy(image)}
    if isinstance(image, dict):
        parts = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in image.items()}
        return {**sample, "image": parts}
    return sample


def _finite(image: Tensor | dict[str, Tensor]) -> Tensor:
    """Where all bands are finite: (H, W), or (T, H, W) for a time series."""
    if isinstance(image, dict):
        # Text and single numbers have no pixels.
        masks = [_finite(part) for part in image.values() if isinstance(part, Tensor) and part.ndim >= 3]
        same = all(mask.shape == masks[0].shape for mask in masks)
        # Modalities on different grids have no common mask; a gap in one makes the whole tile invalid.
        return torch.stack(masks).all(dim=0) if same else torch.stack([mask.all() for mask in masks]).all()[None, None]
    return torch.isfinite(image).all(dim=0)


def _same_data(unfilled: Tensor | dict[str, Tensor], filled: Tensor | dict[str, Tensor]) -> bool:
    if isinstance(unfilled, dict) and isinstance(filled, dict):
        return all(_same_data(unfilled[name], part) for name, part in filled.items() if isinstance(part, Tensor))
    if not isinstance(unfilled, Tensor) or not isinstance(filled, Tensor):
        return False
    return unfilled.shape == filled.shape and bool(((unfilled == filled) | ~torch.isfinite(unfilled)).all())


def band_names(datamodule: LightningDataModule) -> list[str] | dict[str, list[str]]:
    """What the bands of the images, or of each modality, are called; empty where the datamodule does not say it."""
    bands = getattr(datamodule, "output_bands", None) or getattr(datamodule, "bands", None)
    if isinstance(bands, dict):
        return {str(name): [_plain_name(band) for band in of_one] for name, of_one in bands.items() if _is_list(of_one)}
    return [_plain_name(band) for band in bands] if _is_list(bands) else []


def batch_transform(datamodule: LightningDataModule | None) -> Callable[[Batch], Batch] | None:
    """What a datamodule does to a batch in evaluation: some put random crops into the transform for training."""
    names = ("predict_aug", "val_aug", "aug")
    return next((one for name in names if (one := getattr(datamodule, name, None)) is not None), None)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple)


def _plain_name(band: object) -> str:
    return str(getattr(band, "value", band))


def _collate_equal_shapes(samples: Sequence[dict[str, Any]]) -> tuple[list[Batch], list[_Failure]]:
    """Batches of consecutive samples of equal shape, in order, and the failures."""
    failures = [sample["failure"] for sample in samples if "failure" in sample]
    images = (sample for sample in samples if "failure" not in sample)
    return [_collate(list(run)) for _, run in itertools.groupby(images, key=_shapes)], failures


def _shapes(sample: dict[str, Any]) -> object:
    image = sample["image"]
    return {k: getattr(v, "shape", None) for k, v in image.items()} if isinstance(image, dict) else image.shape


def _collate(run: Sequence[dict[str, Any]]) -> Batch:
    lists = ("index", "position", "path")
    inputs = default_collate([{key: value for key, value in sample.items() if key not in lists} for sample in run])
    return {**inputs, **{name: [sample[name] for sample in run] for name in lists}}
