"""The datamodule's images: by default without labels, without augmentation, normalised as the model is used to."""

from __future__ import annotations

import copy
import itertools
import os
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from albumentations import BaseCompose
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from terratorch.datamodules import TilingDataModuleWrapper
from terratorch.datasets.tiled_dataset_wrapper import TiledDataset
from terratorch.datasets.transforms import MultimodalToTensor, MultimodalTransforms
from terratorch.datasets.utils import default_transform
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate, get_worker_info
from torchgeo.datasets import GeoDataset

from terratorch_simpler.data.augmentation import Repeatable, random_state_of
from terratorch_simpler.data.damage import is_damage
from terratorch_simpler.data.source import Batch, FileStat, Share, Skip, Skipped, file_stat, fingerprint
from terratorch_simpler.errors import ConfigurationError, TilesError

LABEL_KEYS = frozenset(
    {
        *("mask", "label", "labels", "filename", "bbox_xyxy", "boxes", "masks", "image_id"),
        *("crs", "bounds", "tile_coords", "base_idx"),
    }
)
"""Keys that TerraTorch's tasks do not hand to the model, or that no model takes."""

DEFAULT_BATCH_SIZE = 16
MAX_BAD_FRACTION = 0.1
TRIED_FIRST = 8
"""Samples that are tried before it is known how to read the others: the first ones may be damaged."""


Split = Literal["train", "val"]
CALLED = {"train": "training images", "val": "validation images"}


class DatamoduleTiles:
    """Streams a datamodule's images in a seeded order.

    The dataset, the datamodule and its loaders stay untouched, and so does the random state of the process: copies of the
    dataset are read. Without ``labels``, masks and labels are not read from disk where the dataset can do without them,
    and never used elsewhere. Images come with the transform of evaluation; random transforms of a dataset that has none
    for evaluation are left out, and those that give images their size start from the number of the image.

    Args:
        datamodule: A datamodule that has been set up for fit.
        seed: Seed of the order.
        split: Training or validation images.
        labels: Whether batches hold the masks or labels as well, under ``target``, if the dataset has any.

    Raises:
        ConfigurationError: If the datamodule has no such dataset, it is empty, or its samples are no images by number.
        TilesError: If the dataset or a transform fails on every image for another reason than damage.
    """

    def __init__(self, datamodule: LightningDataModule, seed: int = 0, split: Split = "train", labels: bool = False) -> None:
        """Copy the dataset, draw the order, and read the first image."""
        self._name = type(datamodule).__name__
        dataset = _dataset_of(datamodule, split, labels)
        _check_dataset(datamodule, dataset, split)
        self._dataset = dataset
        self._order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        evaluation = _evaluation(datamodule, dataset)
        self._images = _Images(dataset, evaluation, labels, self._name)
        self._images.choose_how_to_read(self._order[:TRIED_FIRST])
        self._batch_size = int(getattr(datamodule, "batch_size", None) or DEFAULT_BATCH_SIZE)
        self._num_workers = int(getattr(datamodule, "num_workers", 0) or 0)
        self._share = Share()
        self._stats: list[list[FileStat]] | None = None
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
        named = [[(stat.name, stat.size) for stat in stats] for stats in self._file_stats()]
        return {
            "source": self._name,
            "tiles": total,
            "fingerprint": fingerprint([*named, total, self._order]),
        }

    def changed(self) -> str:
        """A fingerprint of names, sizes and times of the last change of all files."""
        return fingerprint(stat for stats in self._file_stats() for stat in stats)

    def _file_stats(self) -> list[list[FileStat]]:
        """Of every image; each file is looked at once."""
        if self._stats is None:
            self._stats = [
                [file_stat(file) for file in _files(self._dataset, index)] or [FileStat(f"image {index}", -1, -1)]
                for index in range(len(self._order))
            ]
        return self._stats

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
            TilesError: If too many images are unreadable, or the dataset or a transform fails.
        """
        self.skips = self.no_skips()
        loader = DataLoader(
            _InOrder(self._images, self._order, self._share.positions(len(self._order)).tolist()),
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            collate_fn=_stackable,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else it draws a number from the random state of the process
        )
        none_yet = True
        for batches, failed in loader:
            none_yet = none_yet and not batches
            for failure in failed:
                self._skip(failure, none_yet)
            yield from batches

    def _skip(self, failure: _Failure, none_yet: bool) -> None:
        if failure.faulty:
            raise TilesError(failure.message) from failure.error
        try:
            self.skips.add(failure.skip)
        except TilesError as err:
            if none_yet and failure.error is not None and not isinstance(failure.error, OSError):
                raise TilesError(failure.message) from failure.error  # what fails on every file is no damage
            raise err from failure.error
        if self.on_skip is not None:
            self.on_skip(failure.skip)


class _Failure(NamedTuple):
    """An image that could not be used.

    Attributes:
        skip: What to count.
        message: What to say should it be no damage.
        faulty: Whether it is none: code of the dataset or of a transform has failed.
        error: What was raised.
    """

    skip: Skip
    message: str = ""
    faulty: bool = False
    error: Exception | None = None


def _dataset_of(datamodule: LightningDataModule, split: Split, labels: bool) -> Any:
    """The dataset of a split.

    Raises:
        ConfigurationError: If there is none.
    """
    dataset: Any = None
    # The wrapper hands out the dataset of what it wraps, which is that of whole images.
    if not isinstance(datamodule, TilingDataModuleWrapper):
        dataset = getattr(datamodule, f"{split}_dataset", None)
        if dataset is None and split == "train":
            dataset = getattr(datamodule, "dataset", None)
    cause: Exception | None = None
    if dataset is None and hasattr(datamodule, f"{split}_dataloader"):
        try:
            with random_state_of(0):
                # Sen4Map names its datasets otherwise.
                dataset = getattr(getattr(datamodule, f"{split}_dataloader")(), "dataset", None)
        except Exception as err:  # its data may be missing, which is said in our own words
            cause = err
    if dataset is None:
        remedy = "set its roots in the datamodule" if labels else "give the callback tiles of its own"
        why = "" if cause is None else f" (its {split}_dataloader fails: {_shortened(cause)})"
        msg = f"Found no {split}_dataset in {type(datamodule).__name__}, expected one after setup('fit'){why}: {remedy}."
        raise ConfigurationError(msg) from cause
    return dataset


def _check_dataset(datamodule: LightningDataModule, dataset: Any, split: Split) -> None:
    name = type(datamodule).__name__
    if isinstance(dataset, GeoDataset):
        msg = (
            f"Found {name}, whose {type(dataset).__name__} is asked for places on the map, expected images by number: give "
            "the callback tiles, a GeoTiffTiles with the paths of its files."
        )
        raise ConfigurationError(msg)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        msg = (
            f"Found {name}, whose {type(dataset).__name__} is a stream, expected images by number: give "
            "the callback tiles of its own."
        )
        raise ConfigurationError(msg)
    if not len(dataset):
        where = _where_it_looks(datamodule, dataset, split)
        msg = f"Found no {CALLED[split]} in {name} ({where}), expected at least one: change these settings of data."
        raise ConfigurationError(msg)


def _where_it_looks(datamodule: LightningDataModule, dataset: Any, split: Split) -> str:
    """Data root, glob and split file, as far as the datamodule knows them."""
    inner = _leaf(dataset)
    owners = (datamodule, inner)
    settings = {
        "data root": (f"{split}_data_root", f"{split}_root", "data_root", "root"),
        "glob": ("img_grep", "image_grep"),
        "split file": (f"{split}_split", "split_file"),
    }
    found = {
        what: next((v for o in owners for n in names if (v := getattr(o, n, None)) is not None), None)
        for what, names in settings.items()
    }
    return ", ".join(f"{what} {_plain(value)}" for what, value in found.items() if value is not None) or "no root known"


def _plain(value: object) -> str:
    if isinstance(value, dict):  # by modality
        return ", ".join(f"{key}: {part}" for key, part in value.items())
    return str(value)


class _Images(Dataset[dict[str, Any]]):
    """Samples with a mask of valid pixels; their labels, if wanted, under ``target``.

    Args:
        dataset: The datamodule's, left as it is.
        evaluation: Attributes of the dataset that hold its transform, and what evaluation has in their place.
        labels: Whether labels are wanted.
        name: Of the datamodule.
    """

    def __init__(self, dataset: Dataset[Any], evaluation: dict[str, Any], labels: bool, name: str) -> None:
        self._original = dataset
        self._evaluation = evaluation
        self._labels = labels
        self._name = name
        self._use(unlabeled=not (labels and _has_labels(dataset)))

    def __len__(self) -> int:
        return len(self._original)  # type: ignore[arg-type]

    def _use(self, unlabeled: bool) -> None:
        left_out: list[str] = []

        def prepared(leaf: Any, **more: object) -> Repeatable:
            _replace(leaf, {**self._evaluation, **(_nothing_for_labels(leaf) if unlabeled else {}), **more})
            repeatable = Repeatable(leaf)
            left_out.extend(repeatable.left_out)
            return repeatable

        self._plain = _rebuilt(self._original, prepared)
        self.left_out = sorted(set(left_out))
        # TerraTorch fills nodata while reading, after which it cannot be told from data; a second copy leaves it NaN.
        self._gaps = _rebuilt(self._original, lambda leaf: prepared(leaf, no_data_replace=None))
        self._fills = any(getattr(leaf, "no_data_replace", None) is not None for leaf in _leaves(self._original))
        self._unlabeled = unlabeled

    def choose_how_to_read(self, indices: Sequence[int]) -> None:
        """Read with labels, which are dropped, if the dataset cannot do without; say what is left out.

        Args:
            indices: Samples to try, until one can be read.

        Raises:
            ConfigurationError: If samples hold no image.
        """
        if self.left_out:
            rank_zero_info(f"Random transforms of {self._name} are left out of the tiles: {', '.join(self.left_out)}.")
        for index in indices:
            if self._unlabeled and not self._can_read(index):
                self._use(unlabeled=False)
                if self._can_read(index):
                    rank_zero_info(
                        f"{type(_leaf(self._original)).__name__} reads no image without its label: labels are read and "
                        "dropped."
                    )
                    return
                self._use(unlabeled=True)
            elif self._can_read(index):
                return

    def _can_read(self, index: int) -> bool:
        try:
            sample = self._gaps[index]
        except Exception:
            return False
        image = sample.get("image") if isinstance(sample, dict) else None
        if not isinstance(image, Tensor | np.ndarray | dict):
            kind = f"keys {sorted(map(str, sample))}" if isinstance(sample, dict) else type(sample).__name__
            msg = (
                f"Found {self._name}, whose samples are {kind}, expected a dict with an image, a tensor or one for each "
                "modality, under 'image': give the callback tiles of its own."
            )
            raise ConfigurationError(msg)
        if not isinstance(image, dict) and image.ndim < 3 and 0 not in image.shape:
            msg = (
                f"Found {self._name}, whose images are of shape {tuple(image.shape)}, as embeddings are, expected "
                "(channels, height, width): give the callback tiles of its own."
            )
            raise ConfigurationError(msg)
        return True

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            sample, valid = self._read(index)
        except Exception as err:
            return {"failure": self._failure(index, err)}
        if not valid.any():
            return {"failure": _Failure(Skip(-1, "nodata", self._file(index), False))}
        if not _finite(sample["image"]).all():
            # Without no_data_replace the NaN would spread to every token of the tile.
            return {"failure": _Failure(Skip(-1, "NaN without no_data_replace", self._file(index), False))}
        inputs = {key: value for key, value in sample.items() if key not in LABEL_KEYS}
        found = [sample[key] for key in ("label", "mask") if self._labels and key in sample]
        target = {"target": found[0]} if found else {}
        return {**inputs, **target, "valid": valid, "index": index}

    def _read(self, index: int) -> tuple[dict[str, Any], Tensor]:
        sample = _as_tensors(self._gaps[index])
        valid = _finite(sample["image"])
        if valid.ndim < 2 or not valid.numel():
            raise OSError("no pixels")  # tifffile reads a truncated file as an empty array
        if self._fills and not valid.all():
            filled = _as_tensors(self._plain[index])
            if not _same_data(sample["image"], filled["image"]):
                msg = "the same image is another one each time it is read, so nodata has no place in it"
                raise RuntimeError(msg)
            sample = filled
        return sample, valid

    def _failure(self, index: int, err: Exception) -> _Failure:
        file, why = self._file(index), _shortened(err)
        place = traceback.extract_tb(err.__traceback__)[-1]
        where = f"{place.name} ({os.path.basename(place.filename)}, line {place.lineno})"
        message = (
            f"Found {type(err).__name__} ({why}) in {where} when {type(_leaf(self._original)).__name__} of {self._name} "
            f"reads {file}, expected an image, since the file is not damaged: mend the dataset or its transform, or give "
            "the callback tiles of its own."
        )
        faulty = not is_damage(err, _files(self._original, index))
        # Errors of any type and with anything in them may not survive the way out of a worker.
        cause = err if get_worker_info() is None else _kept(err)
        return _Failure(Skip(-1, "unreadable", f"{file}: {why}", True), message, faulty, cause)

    def _file(self, index: int) -> str:
        return next(iter(_files(self._original, index)), f"image {index}")


def _kept(err: Exception) -> Exception:
    text = "".join(traceback.format_exception(err))
    return OSError(text) if isinstance(err, OSError) else RuntimeError(text)


def _shortened(err: Exception) -> str:
    return textwrap.shorten(str(err), 100) or type(err).__name__


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
        if "failure" in sample:
            failure: _Failure = sample["failure"]
            return {"failure": failure._replace(skip=failure.skip._replace(position=position))}
        return {**sample, "position": position}


class _UncachedTiles(Dataset[Any]):
    """Tiles of TerraTorch's TiledDataset without the cache on disk, in which they are augmented for good."""

    def __init__(self, tiled: TiledDataset, images: Dataset[Any]) -> None:
        self._tiled = tiled
        self._images = images

    def __len__(self) -> int:
        return len(self._tiled)

    def __getitem__(self, index: int) -> Any:
        image, *window = self._tiled.tiles[index]
        return self._tiled._extract_tile(self._images[image], *window, image)


def _rebuilt(dataset: Dataset[Any], change: Callable[[Any], Dataset[Any]]) -> Dataset[Any]:
    """The same arrangement of datasets, with a changed copy of each that reads."""
    if isinstance(dataset, Subset):
        return Subset(_rebuilt(dataset.dataset, change), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([_rebuilt(part, change) for part in dataset.datasets])
    if isinstance(dataset, TiledDataset):
        return _UncachedTiles(dataset, _rebuilt(dataset.base_dataset, change))
    return change(copy.copy(dataset))


def _leaves(dataset: Any) -> list[Any]:
    """The datasets that read."""
    if isinstance(dataset, Subset):
        return _leaves(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return list(itertools.chain.from_iterable(map(_leaves, dataset.datasets)))
    if isinstance(dataset, TiledDataset):
        return _leaves(dataset.base_dataset)
    return [dataset]


def _leaf(dataset: Any) -> Any:
    return _leaves(dataset)[0]


def _files(dataset: Any, index: int) -> list[str]:
    """Files of an image, without its labels; empty where the dataset does not list them."""
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
            return _paths([files[index]])
    return []


def _paths(values: Sequence[object]) -> list[str]:
    """Paths among values and lists of values."""
    found: list[str] = []
    for value in values:
        if isinstance(value, str | Path):
            found.append(str(value))
        elif isinstance(value, list | tuple):
            found.extend(_paths(value))
    return found


def _samples_by_modality(dataset: object) -> list[dict[str, Any]]:
    """What TerraTorch's datasets of modalities read for each sample; empty for others."""
    samples = getattr(dataset, "samples", None)
    return samples if isinstance(samples, list) and samples and isinstance(samples[0], dict) else []


def _as_tensors(sample: dict[str, Any]) -> dict[str, Any]:
    """Arrays as tensors, which a loader makes of them as well."""
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
        # Modalities on different grids have no common mask; a gap in one makes the whole tile suspect.
        return torch.stack(masks).all(dim=0) if same else torch.stack([mask.all() for mask in masks]).all()[None, None]
    return torch.isfinite(image).all(dim=0)


def _same_data(gaps: Tensor | dict[str, Tensor], filled: Tensor | dict[str, Tensor]) -> bool:
    """Whether two reads differ in nothing but the gaps of the first."""
    if isinstance(gaps, dict) and isinstance(filled, dict):
        return all(_same_data(gaps[name], part) for name, part in filled.items() if isinstance(part, Tensor))
    if not isinstance(gaps, Tensor) or not isinstance(filled, Tensor):
        return False
    return gaps.shape == filled.shape and bool(((gaps == filled) | ~torch.isfinite(gaps)).all())


def _replace(dataset: object, attributes: dict[str, Any]) -> None:
    """Set those of the attributes that the dataset has."""
    for name, value in attributes.items():
        if hasattr(dataset, name):
            setattr(dataset, name, value)


def _has_labels(dataset: Dataset[Any]) -> bool:
    """Whether the masks are not the images once more, which TerraTorch takes where it finds none."""
    inner = _leaf(dataset)
    masks = getattr(inner, "segmentation_mask_files", None)
    return masks is None or masks != getattr(inner, "image_files", None)


def _nothing_for_labels(dataset: object) -> dict[str, Any]:
    """Attributes that keep TerraTorch's generic datasets from reading labels."""
    attributes: dict[str, Any] = {"segmentation_mask_files": [], "require_label": False}
    if samples := _samples_by_modality(dataset):  # the mask is among them
        unlabeled = [{key: value for key, value in sample.items() if key != "mask"} for sample in samples]
        attributes |= {"samples": unlabeled, "scalar_label": False}
    return attributes


def _evaluation(datamodule: LightningDataModule, dataset: Dataset[Any]) -> dict[str, Any]:
    """The transform of evaluation by the attribute that holds it; empty if the datamodule does not say.

    That of the validation dataset, which its class has completed: each has a default of its own.
    """
    inner = _leaf(dataset)
    names = [name for name in ("transform", "transforms") if hasattr(inner, name)]
    given = getattr(datamodule, "test_transform", None)
    if _is_given(given) and not _is_given(getattr(datamodule, "val_transform", None)):
        return dict.fromkeys(names, _for_modalities(inner, given))
    validation = getattr(datamodule, "val_dataset", None)
    validation = None if validation is None else _leaf(validation)
    if validation is not inner and type(validation) is type(inner):
        return {name: getattr(validation, name) for name in names}
    if hasattr(datamodule, "train_transform"):
        return dict.fromkeys(names, _for_modalities(inner, None))
    return {}


def _is_given(transform: object) -> bool:
    return any(transform.values()) if isinstance(transform, dict) else transform is not None


def _for_modalities(dataset: Any, transform: Any) -> Callable[..., Any]:
    """A transform of images by modality, as TerraTorch's datasets build it from the datamodule's."""
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


def _stackable(samples: Sequence[dict[str, Any]]) -> tuple[list[Batch], list[_Failure]]:
    """Collate neighbours of equal shape, in order; tiles of unequal size become batches of their own."""
    failed = [sample["failure"] for sample in samples if "failure" in sample]
    runs: list[list[dict[str, Any]]] = []
    for sample in samples:
        if "failure" in sample:
            continue
        if runs and _shapes(runs[-1][0]) == _shapes(sample):
            runs[-1].append(sample)
        else:
            runs.append([sample])
    return [_collate(run) for run in runs], failed


def _shapes(sample: dict[str, Any]) -> object:
    image = sample["image"]
    return {k: getattr(v, "shape", None) for k, v in image.items()} if isinstance(image, dict) else image.shape


def _collate(run: Sequence[dict[str, Any]]) -> Batch:
    numbers = ("index", "position")
    inputs = default_collate([{key: value for key, value in sample.items() if key not in numbers} for sample in run])
    return {**inputs, **{name: [sample[name] for sample in run] for name in numbers}}
