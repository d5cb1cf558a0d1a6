"""Any iterable of batches of images as a source of tiles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from terratorch_simpler.data.source import Batch, Skip, SkipCounter
from terratorch_simpler.errors import TilesError

IMAGE_KEYS = ("image", "pixel_values")
"""The second is what image processors of transformers call it."""
TARGET_KEYS = ("mask", "label", "labels")
MOST_STREAMED = 8
"""Images that are streamed for each that is wanted, where most hold no pixel to use: an iterable may have no end."""


class BatchTiles:
    """Numbers the tiles of an iterable of batches in the order in which they come.

    A batch is an image tensor float (B, C, H, W) or (B, C, T, H, W), a dictionary with ``image`` (or ``pixel_values``; also
    a dictionary of modalities), or a pair of images and labels. Pixels that are NaN in any channel count as nodata and are
    set to 0. Of a dictionary, ``valid`` bool (B, H, W), and ``index`` and ``path`` of :class:`GeoTiffTiles` are taken over:
    images with the same path are one place.

    Args:
        batches: The iterable; a generator can be streamed only once.
        max_tiles: Most tiles that are wanted; up to eight times as many are streamed if some hold nodata only.
        fewest: Fewest tiles that are enough.
        labels: Whether to hand on labels: the second of a pair, or ``mask``, ``label`` or ``labels`` of a dictionary. They
            are a tensor, or a dictionary of label sets by name.
        what: Name of the iterable, for messages and for images without a name.
    """

    def __init__(
        self, batches: Iterable[Any], max_tiles: int, fewest: int, labels: bool = False, what: str = "batches"
    ) -> None:
        self.skips = self.new_skip_counter()
        self.pin_memory = False
        self.on_skip: Callable[[Skip], None] | None = None
        self._batches = batches
        self._max_tiles = max_tiles
        self._fewest = fewest
        self._labels = labels
        self._what = what
        self._names: dict[int, str] = {}

    @property
    def skipped(self) -> dict[str, int]:
        """Nothing is skipped by the source itself."""
        return {}

    def __len__(self) -> int:
        """Most images that are streamed for those that can be used; how many there are shows when the iterable ends."""
        return min(sys.maxsize, MOST_STREAMED * self._max_tiles)

    def __iter__(self) -> Iterator[Batch]:
        """Stream the tiles.

        Raises:
            TilesError: If a batch holds no images, or the iterable ends too early.
        """
        count = 0
        for batch in self._batches:
            tiles = _tiles(batch, count, self._labels)
            count += len(tiles["index"])
            if self._labels:
                self._names |= dict(zip(tiles["index"], map(str, tiles.get("path", ())), strict=False))
            yield tiles
        if count < self._fewest:
            once = " (a generator can be used only once)" if not count and isinstance(self._batches, Iterator) else ""
            msg = (
                f"{self._what} yielded {count} tiles{once}; at least {self._fewest} are needed to compare blocks, and 256 "
                "are recommended: pass more unlabeled images."
            )
            raise TilesError(msg)

    def describe(self) -> dict[str, Any]:
        """Only the type of the iterable is known."""
        return {"source": type(self._batches).__name__}

    def name_of(self, number: int) -> str:
        """File of an image that was streamed with its label; where it is not known, its number."""
        return self._names.get(number, f"image {number} of {self._what}")

    def modification_fingerprint(self) -> str:
        """Not known."""
        return ""

    def shard(self, num_shards: int, index: int, block: int = 1, start: int = 0) -> BatchTiles:  # noqa: ARG002
        """The whole stream: several processes would each iterate over batches of their own."""
        assert num_shards == 1
        return self

    def new_skip_counter(self) -> SkipCounter:
        """An empty count; nodata tiles are no damage."""
        return SkipCounter(0, max_bad_fraction=1.0)


def num_tiles(batch: Any) -> int:
    """Number of images of a batch.

    Raises:
        TilesError: If it holds no images.
    """
    image = _first(batch, IMAGE_KEYS)
    return len(next(iter(image.values())) if isinstance(image, Mapping) else image)


def _tiles(batch: Any, first: int, labels: bool) -> Batch:
    image = _first(batch, IMAGE_KEYS)
    given = batch if isinstance(batch, Mapping) else {}
    if isinstance(image, Mapping):  # modalities, whose grids have no common mask
        size = len(next(iter(image.values())))
        image, valid = dict(image), torch.ones(size, 1, 1, dtype=torch.bool)
    else:
        image, valid = _without_nan(image)
        valid &= _own_mask(given.get("valid"), valid)
    positions = list(range(first, first + len(valid)))
    numbers = given.get("index")
    known = isinstance(numbers, list) and len(numbers) == len(valid) and all(type(number) is int for number in numbers)
    tiles = {"image": image, "valid": valid, "index": numbers if known else positions, "position": positions}
    paths = given.get("path", given.get("filename"))  # of GeoTiffTiles, and of TerraTorch's datasets
    if isinstance(paths, list) and len(paths) == len(valid) and all(isinstance(path, str) for path in paths):
        tiles["path"] = paths
    if labels:
        target = _first(batch, TARGET_KEYS, second=True)
        several = isinstance(target, Mapping)
        tiles["target"] = {name: _on_cpu(part) for name, part in target.items()} if several else _on_cpu(target)
    return tiles


def _own_mask(own: object, valid: Tensor) -> Tensor:
    """The mask of the batch, if it has one, in the shape of ``valid``: one mask counts for all frames."""
    if not isinstance(own, Tensor):
        return torch.ones_like(valid)
    mask = own.cpu().bool()
    if mask.ndim == 3 and valid.ndim == 4:
        mask = mask[:, None]
    if mask.ndim != valid.ndim or mask.shape[0] != valid.shape[0] or mask.shape[-2:] != valid.shape[-2:]:
        msg = (
            f"batches yielded a mask 'valid' of shape {tuple(own.shape)}, expected {tuple(valid.shape)}, one of the pixels "
            "of every image: correct or remove it."
        )
        raise TilesError(msg)
    return mask.expand_as(valid)


def _on_cpu(labels: Any) -> Any:
    return labels.cpu() if isinstance(labels, Tensor) else labels


def _first(batch: Any, keys: tuple[str, ...], second: bool = False) -> Any:
    """Images of a batch, or what comes second in a pair."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in keys if key in batch), None)
    elif isinstance(batch, tuple | list):
        found = batch[second] if len(batch) > second else None
    else:
        found = None if second else batch
    if second or isinstance(found, Tensor | Mapping):
        return found
    keys_found = f" with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    msg = (
        f"batches yielded a {type(batch).__name__}{keys_found}, expected an image tensor (B, C, H, W), a dict with "
        f"'image', or an (image, label) pair: wrap the loader in a generator that yields one of these."
    )
    raise TilesError(msg)


def _without_nan(image: Tensor) -> tuple[Tensor, Tensor]:
    """Images with 0 in the place of NaN, and which pixels were not NaN, (B, H, W) or (B, T, H, W), on the CPU."""
    if image.ndim not in (4, 5) or not image.is_floating_point():
        msg = (
            f"batches yielded images of shape {tuple(image.shape)} and type {str(image.dtype).removeprefix('torch.')}, "
            "expected floating-point images (B, C, H, W) or (B, C, T, H, W), normalized as for training: batch or convert "
            "them."
        )
        raise TilesError(msg)
    missing = image.isnan().any(dim=1)
    return image.masked_fill(missing.unsqueeze(1), 0.0) if missing.any() else image, ~missing.cpu()
