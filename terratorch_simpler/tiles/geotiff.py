"""Unlabeled windows of GeoTIFF files."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from terratorch_simpler.errors import TilesError
from terratorch_simpler.tiles.source import Batch, Skipped, file_size, fingerprint

EXTENSIONS = (".tif", ".tiff", ".TIF", ".TIFF")


class _Place(NamedTuple):
    """A window of a file: offsets in pixels."""

    path: str
    column: int
    row: int


class _Tile(NamedTuple):
    """A window that was read: pixels, where they hold data, and its number in the grid of all windows."""

    place: _Place
    number: int
    image: NDArray[np.float32]
    valid: NDArray[np.bool_]


class _Unusable(NamedTuple):
    place: _Place
    reason: str
    bad: bool


class GeoTiffTiles:
    """Windows of GeoTIFF files in a seeded order, as float32 tensors with a mask of valid pixels.

    Windows lie on a grid of ``stride`` in every file. Their order is a permutation drawn from ``seed`` and does not
    depend on ``batch_size`` or ``num_workers``. A window that lacks data in more than ``max_nodata_fraction`` of its
    pixels, or cannot be read, is skipped and counted in ``skipped``. Unlike torchgeo's RasterDataset, files need no
    common CRS or resolution and are not resampled: an encoder sees pixels, not places.

    Args:
        paths: A file, a folder (its GeoTIFF files, subfolders included), a glob, a .txt file with one path a line, a
            GDAL /vsi path, or a list of these.
        tile_size: Side of a tile in pixels.
        stride: Step of the grid in pixels; by default ``tile_size``.
        bands: Bands to read, as 1-based numbers or band descriptions; by default all.
        num_frames: Time steps stacked in the bands, all bands of a step together; more than one gives (B, C, T, H, W).
        nodata: Value that means no data, beside NaN; by default the file's own.
        max_nodata_fraction: Share of a tile's pixels that may lack data in any band.
        scale: Factor on the stored values.
        offset: Added after ``scale``.
        means: Band means, to normalise; by default the datamodule's are used when the callback runs.
        stds: Band standard deviations.
        batch_size: Tiles in a batch.
        num_workers: Threads that read.
        max_bad_fraction: Share of windows that may be unreadable before it is an error.
        seed: Seed of the order.

    Raises:
        TilesError: If no file is found, or an option has no meaning.
    """

    def __init__(
        self,
        paths: str | list[str],
        tile_size: int = 224,
        stride: int | None = None,
        bands: list[int | str] | None = None,
        num_frames: int = 1,
        nodata: float | None = None,
        max_nodata_fraction: float = 0.5,
        scale: float = 1.0,
        offset: float = 0.0,
        means: list[float] | None = None,
        stds: list[float] | None = None,
        batch_size: int = 16,
        num_workers: int = 4,
        max_bad_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Find the files; they are opened when streaming starts."""
        for name, value, least in (("tile_size", tile_size, 1), ("stride", stride, 1), ("num_frames", num_frames, 1),
                                   ("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):  # fmt: skip
            if value is not None and value < least:
                msg = f"Found {name} {value}, expected at least {least}: change {name}."
                raise TilesError(msg)
        if (means is None) != (stds is None) or (means and stds and len(means) != len(stds)):
            msg = f"Found means {means} and stds {stds}, expected both with one value a band, or neither: give the other."
            raise TilesError(msg)
        self.paths = _find_files(paths)
        self.tile_size = tile_size
        self.stride = stride or tile_size
        self.bands = bands
        self.num_frames = num_frames
        self.nodata = nodata
        self.max_nodata_fraction = max_nodata_fraction
        self.scale = scale
        self.offset = offset
        self.means = means
        self.stds = stds
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_bad_fraction = max_bad_fraction
        self.seed = seed
        self._unindexed: list[_Unusable] = []
        self._places: list[_Place] | None = None
        self.skips = Skipped(planned=0, max_bad_fraction=max_bad_fraction)

    @property
    def skipped(self) -> dict[str, int]:
        """How many files or windows could not be used in the last pass, by reason."""
        return dict(self.skips.counts)

    def __len__(self) -> int:
        """Windows on the grids of all readable files."""
        return len(self._grid())

    def describe(self) -> dict[str, Any]:
        """Kind, number of files and windows, and a fingerprint of names, sizes and settings."""
        settings = (self.tile_size, self.stride, self.bands, self.num_frames, self.nodata, self.scale, self.offset)
        files = ((Path(path).name, file_size(path)) for path in self.paths)
        return {
            "source": "GeoTiffTiles",
            "files": len(self.paths),
            "tiles": len(self),
            "fingerprint": fingerprint([*files, settings, self.seed]),
        }

    def __iter__(self) -> Iterator[Batch]:
        """Stream batches: the keys of :data:`~terratorch_simpler.tiles.source.Batch`, ``path`` and ``window``.

        Raises:
            TilesError: If too many windows are unreadable, or all files are smaller than a tile.
        """
        places = self._grid()
        self.skips = Skipped(len(places) + len(self._unindexed), self.max_bad_fraction)
        for unusable in self._unindexed:
            self.skips.add(unusable.reason, unusable.place.path, unusable.bad)
        if not places:
            msg = f"Found no window of {self.tile_size} x {self.tile_size} pixels ({self.skips}): use a smaller tile_size."
            raise TilesError(msg)
        batch: list[_Tile] = []
        for tile in self._read_all(places):
            if isinstance(tile, _Unusable):
                self.skips.add(tile.reason, tile.place.path, tile.bad)
                continue
            if batch and (tile.image.shape != batch[0].image.shape or len(batch) == self.batch_size):
                yield self._collate(batch)
                batch = []
            batch.append(tile)
        if batch:
            yield self._collate(batch)

    def _grid(self) -> list[_Place]:
        """Windows of all files, opening each file once, without reading pixels."""
        if self._places is None:
            self._places, self._unindexed = [], []
            for path in self.paths:
                try:
                    with _open(path) as src:
                        width, height = src.width, src.height
                except (RasterioError, OSError):
                    self._unindexed.append(_Unusable(_Place(path, 0, 0), "unreadable", True))
                    continue
                if min(width, height) < self.tile_size:
                    self._unindexed.append(_Unusable(_Place(path, 0, 0), "smaller than tile_size", False))
                rows = range(0, height - self.tile_size + 1, self.stride)
                columns = range(0, width - self.tile_size + 1, self.stride)
                self._places.extend(_Place(path, column, row) for row in rows for column in columns)
        return self._places

    def _read_all(self, places: Sequence[_Place]) -> Iterator[_Tile | _Unusable]:
        """Read in the seeded order, a bounded number of windows ahead."""
        order = np.random.default_rng(self.seed).permutation(len(places)).tolist()
        if self.num_workers == 0:
            yield from (self._read(places[number], number) for number in order)
            return
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="tiles") as pool:
            coming = iter(order)
            ahead = [pool.submit(self._read, places[n], n) for n in islice(coming, 2 * self.batch_size)]
            try:
                while ahead:
                    yield ahead.pop(0).result()
                    ahead.extend(pool.submit(self._read, places[n], n) for n in islice(coming, 1))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, place: _Place, number: int) -> _Tile | _Unusable:
        window = Window(place.column, place.row, self.tile_size, self.tile_size)
        try:
            with _open(place.path) as src:
                pixels = src.read(self._indexes(src), window=window)
                values = src.nodatavals if self.nodata is None else [self.nodata] * src.count
                nodata = [values[index - 1] for index in self._indexes(src)]
        except (RasterioError, OSError):
            return _Unusable(place, "unreadable", True)
        image = pixels.astype(np.float32)
        lacks = ~np.isfinite(image)
        for band, value in enumerate(nodata):
            if value is not None and np.isfinite(value):
                lacks[band] |= pixels[band] == value
        valid = ~lacks.any(axis=0)
        if not valid.any() or 1 - valid.mean() > self.max_nodata_fraction:
            return _Unusable(place, "nodata", False)
        image = image * np.float32(self.scale) + np.float32(self.offset)
        # What is missing gets the mean of the band, so that it neither stands out nor spreads through attention.
        fill = self._band_fill(image, lacks)
        image = np.where(lacks, fill[:, None, None], image)
        return _Tile(place, number, self._normalise(image), valid)

    def _band_fill(self, image: NDArray[np.float32], lacks: NDArray[np.bool_]) -> NDArray[np.float32]:
        if self.means is not None and len(self.means) == len(image):
            return np.asarray(self.means, dtype=np.float32)
        return np.array([band[~gap].mean() for band, gap in zip(image, lacks, strict=True)], dtype=np.float32)

    def _normalise(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.means is not None and self.stds is not None:
            if len(self.means) not in (len(image), len(image) // self.num_frames):
                msg = (
                    f"Found {len(image)} bands and {len(self.means)} means, expected one mean a band: change bands or means."
                )
                raise TilesError(msg)
            repeat = len(image) // len(self.means)
            means, stds = (np.tile(np.asarray(v, dtype=np.float32), repeat) for v in (self.means, self.stds))
            image = (image - means[:, None, None]) / stds[:, None, None]
        if self.num_frames == 1:
            return image
        if len(image) % self.num_frames:
            msg = f"Found {len(image)} bands for {self.num_frames} frames, expected a multiple: change bands or num_frames."
            raise TilesError(msg)
        return image.reshape(self.num_frames, -1, *image.shape[1:]).swapaxes(0, 1)

    def _indexes(self, src: rasterio.DatasetReader) -> list[int]:
        if self.bands is None:
            return list(src.indexes)
        indexes = []
        for band in self.bands:
            index = band
            if isinstance(band, str):
                index = src.descriptions.index(band) + 1 if band in src.descriptions else 0
            if not isinstance(index, int) or not 1 <= index <= src.count:
                known = [description for description in src.descriptions if description]
                msg = f"Found no band {band!r} in {src.name}, expected 1 to {src.count} or one of {known}: change bands."
                raise TilesError(msg)
            indexes.append(index)
        return indexes

    def _collate(self, tiles: Sequence[_Tile]) -> Batch:
        size = self.tile_size
        return {
            "image": torch.from_numpy(np.stack([tile.image for tile in tiles])),
            "valid": torch.from_numpy(np.stack([tile.valid for tile in tiles])),
            "index": [tile.number for tile in tiles],
            "path": [tile.place.path for tile in tiles],
            "window": torch.tensor([[tile.place.column, tile.place.row, size, size] for tile in tiles]),
        }


def _open(path: str) -> rasterio.DatasetReader:
    with warnings.catch_warnings():
        # Pixels are wanted, not places: a file without georeference is as good as any.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path)


def _find_files(paths: str | list[str]) -> list[str]:
    """Files named by a path, folder, glob, .txt list, /vsi path, or a list of these, each once, in order."""
    found: list[str] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = os.fspath(path)
        if path.startswith("/vsi"):
            found.append(path)
        elif Path(path).is_dir():
            found.extend(str(file) for file in sorted(Path(path).rglob("*")) if file.suffix in EXTENSIONS)
        elif path.endswith(".txt") and Path(path).is_file():
            found.extend(_find_files([line for line in Path(path).read_text().splitlines() if line.strip()]))
        elif Path(path).is_file():
            found.append(path)
        else:
            found.extend(sorted(glob.glob(path, recursive=True)))
    if not found:
        msg = f"Found no GeoTIFF file at {paths}, expected a file, folder, glob, .txt list or /vsi path: check paths."
        raise TilesError(msg)
    return list(dict.fromkeys(found))
