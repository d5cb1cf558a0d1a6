"""Unlabeled windows of GeoTIFF files."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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

EXTENSIONS = (".tif", ".tiff")

DAMAGE = (RasterioError, OSError, UnicodeDecodeError)
"""What rasterio raises on damaged files; the last for band descriptions."""

MAX_PIXELS_PER_BYTE = 2**15
"""A block of constant pixels takes some 30 bytes and seldom has more than 1024 x 1024: beyond this the header lies."""


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
        for name, share in (("max_nodata_fraction", max_nodata_fraction), ("max_bad_fraction", max_bad_fraction)):
            if not 0 <= share <= 1:
                msg = f"Found {name} {share}, expected 0 to 1: change {name}."
                raise TilesError(msg)
        if bands is not None and not bands:
            msg = "Found an empty list of bands, expected at least one: name bands, or leave bands out to read all."
            raise TilesError(msg)
        if (means is None) != (stds is None) or (means is not None and stds is not None and not 0 < len(means) == len(stds)):
            msg = f"Found means {means} and stds {stds}, expected both with one value a band, or neither: give the other."
            raise TilesError(msg)
        if stds is not None and not all(std > 0 for std in stds):
            msg = f"Found stds {stds}, expected values above 0: change stds."
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
        settings = (
            *(self.tile_size, self.stride, self.bands, self.num_frames, self.nodata, self.max_nodata_fraction),
            *(self.scale, self.offset, self.means, self.stds),
        )
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
            msg = (
                f"Found no window of {self.tile_size} x {self.tile_size} pixels ({self.skips}), expected at least one: use "
                "a smaller tile_size."
            )
            raise TilesError(msg)
        batch: list[_Tile] = []
        # The traceback of an error keeps generators alive; closing ends the threads all the same.
        with closing(self._read_all(places)) as tiles:
            for tile in tiles:
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
        # Pixels are wanted, not places: a file without georeference is as good as any. TerraTorch's datasets set this
        # filter too; catch_warnings would restore the filters of other threads.
        warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
        if self._places is None:
            self._places, self._unindexed = [], []
            for path in self.paths:
                try:
                    with rasterio.open(path) as src:
                        width, height = src.width, src.height
                except DAMAGE:
                    width = height = 0
                if not width or width * height > MAX_PIXELS_PER_BYTE * file_size(path) > 0:
                    self._unindexed.append(_Unusable(_Place(path, 0, 0), "unreadable", True))
                    continue
                if min(width, height) < self.tile_size:
                    self._unindexed.append(_Unusable(_Place(path, 0, 0), "smaller than tile_size", False))
                rows = range(0, height - self.tile_size + 1, self.stride)
                columns = range(0, width - self.tile_size + 1, self.stride)
                self._places.extend(_Place(path, column, row) for row in rows for column in columns)
        return self._places

    def _read_all(self, places: Sequence[_Place]) -> Generator[_Tile | _Unusable, None, None]:
        """Read in the seeded order, a bounded number of windows ahead."""
        order = np.random.default_rng(self.seed).permutation(len(places)).tolist()
        if self.num_workers == 0:
            yield from (self._read(places[number], number) for number in order)
            return
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="tiles") as pool:
            coming, ahead_of_use = iter(order), 2 * max(self.batch_size, self.num_workers)
            ahead = [pool.submit(self._read, places[n], n) for n in islice(coming, ahead_of_use)]
            try:
                while ahead:
                    yield ahead.pop(0).result()
                    ahead.extend(pool.submit(self._read, places[n], n) for n in islice(coming, 1))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, place: _Place, number: int) -> _Tile | _Unusable:
        window = Window(place.column, place.row, self.tile_size, self.tile_size)
        try:
            with rasterio.open(place.path) as src:
                indexes = self._indexes(src)
                pixels = src.read(indexes, window=window)
                values = src.nodatavals if self.nodata is None else [self.nodata] * src.count
        except DAMAGE:
            return _Unusable(place, "unreadable", True)
        statistics = self._statistics(len(indexes))
        with np.errstate(over="ignore"):  # float64 files mark nodata by numbers that become infinite here
            image = pixels.astype(np.float32)
        lacks = ~np.isfinite(image)
        for band, value in enumerate(values[index - 1] for index in indexes):
            if value is not None and np.isfinite(value):
                lacks[band] |= pixels[band] == value
        valid = ~lacks.any(axis=0)
        if not valid.any() or (~valid).mean() > self.max_nodata_fraction:
            return _Unusable(place, "nodata", False)
        # What is missing gets the mean of the band, so that it neither stands out nor spreads through attention.
        image = np.where(lacks, 0, image) * np.float32(self.scale) + np.float32(self.offset)
        if statistics is None:
            means = np.array([band[~gap].mean() for band, gap in zip(image, lacks, strict=True)], dtype=np.float32)
            image = np.where(lacks, means[:, None, None], image)
        else:
            means, stds = statistics
            image = (np.where(lacks, means, image) - means) / stds
        if self.num_frames > 1:
            image = image.reshape(self.num_frames, -1, *image.shape[1:]).swapaxes(0, 1)
        return _Tile(place, number, image, valid)

    def _statistics(self, count: int) -> NDArray[np.float32] | None:
        """Means and standard deviations of all bands (2, count, 1, 1); those of one time step serve every step."""
        if count % self.num_frames:
            msg = f"Found {count} bands for {self.num_frames} frames, expected a multiple: change bands or num_frames."
            raise TilesError(msg)
        if self.means is None or self.stds is None:
            return None
        if len(self.means) not in (count, count // self.num_frames):
            msg = f"Found {count} bands and {len(self.means)} means, expected one mean a band: change bands or means."
            raise TilesError(msg)
        values = np.array([self.means, self.stds], dtype=np.float32)
        return np.tile(values, count // len(self.means))[..., None, None]

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


def _find_files(paths: str | list[str]) -> list[str]:
    """Files named by a path, folder, glob, .txt list, /vsi path, or a list of these, each once, in order."""
    found = {path: _files_at(os.fspath(path)) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)}
    missing = [str(path) for path, files in found.items() if not files]
    if missing or not found:
        where = ", ".join(missing) or paths
        msg = f"Found no GeoTIFF file at {where}, expected a file, folder, glob, .txt list or /vsi path: check paths."
        raise TilesError(msg)
    return list(dict.fromkeys(file for files in found.values() for file in files))


def _files_at(path: str) -> list[str]:
    if path.startswith("/vsi"):
        return [path]
    if Path(path).is_dir():
        return [str(file) for file in sorted(Path(path).rglob("*")) if file.suffix.lower() in EXTENSIONS and file.is_file()]
    if not Path(path).is_file():
        return sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not path.endswith(".txt"):
        return [path]
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return _find_files(lines) if lines else []
