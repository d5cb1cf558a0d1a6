"""Reads windows: pixels, nodata masks, time and location, normalized and padded, or the reason why one is skipped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from terratorch_simpler.data.failures import FileChangedError, skip_for
from terratorch_simpler.data.index import TileWindow
from terratorch_simpler.data.metadata import center, date_from_tags
from terratorch_simpler.data.prefetch import Slot
from terratorch_simpler.data.rasters import Header, RasterCache
from terratorch_simpler.data.source import Skip

Day = tuple[int, int]
"""Year, and day of the year from 0."""


class TileRequest(NamedTuple):
    """A window to read, its position in the stream, and where its pixels go."""

    position: int
    window: TileWindow
    slot: Slot

    def __str__(self) -> str:
        return self.window.paths[0]


class Tile(NamedTuple):
    """A window that was read; valid (H, W) is None where all pixels hold data."""

    position: int
    window: TileWindow
    slot: Slot
    valid: NDArray[np.bool_] | None
    days: list[Day]
    location: tuple[float, float] | None


@dataclass
class WindowReader:
    """Reads windows from files that stay open, in any thread.

    Attributes:
        headers: Headers of the files when they were indexed.
        bands: Bands to read of every file, from 1.
        days: Days known from file names, others come from tags; None if time and location are not wanted.
        num_frames: Time steps, each a file of its own or stacked in the bands.
        nodata: Nodata value; None for the file's own.
        max_nodata_fraction: Fraction of pixels that may lack data.
        scale: Factor on the stored values; "file" for the one stored in the file.
        offset: Added after ``scale``; "file" likewise.
        means: Band means of the scaled values, if they are to be normalized.
        stds: Band standard deviations, likewise.
        timeout: Seconds after which a failed read counts as timed out.
    """

    headers: Mapping[str, Header]
    bands: Mapping[str, Sequence[int]]
    days: Mapping[str, Day] | None
    num_frames: int
    nodata: float | None
    max_nodata_fraction: float
    scale: float | str
    offset: float | str
    means: Sequence[float] | None
    stds: Sequence[float] | None
    timeout: float

    def __post_init__(self) -> None:
        # Values that are only converted to float32 are checked for overflow while reading.
        self._may_overflow = (self.scale, self.offset, self.means) != (1, 0, None)
        self._files = RasterCache(georeferenced=self.days is not None)
        self._hung: set[str] = set()

    def __enter__(self) -> WindowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def give_up(self, request: TileRequest) -> Skip:
        """Skip a window whose read does not end, and from now on its files and the memory it may still write to."""
        self._hung.update(request.window.paths)
        request.slot.buffer.tainted = True
        return Skip(request.position, "timed out", str(request), bad=True)

    def read(self, request: TileRequest) -> Tile | Skip:
        """Read a window into its slot, (C, H, W) or (C, T, H, W)."""
        position, window, slot = request
        pixels = slot.pixels
        padded = pixels.swapaxes(0, 1) if self.num_frames > 1 else pixels[None]  # (T, C, H, W)
        image = padded[..., : window.height, : window.width]
        started, path = time.monotonic(), ""
        frames: list[_Frame] = []
        try:
            for path, out in zip(window.paths, np.split(image, len(window.paths)), strict=True):
                if path in self._hung:
                    return Skip(position, "timed out", path, bad=True)
                frames.append(self._read_file(path, window, out))
        except Exception as error:  # whatever a file can cause
            if time.monotonic() - started >= self.timeout:
                return Skip(position, "timed out", path, bad=True)
            return skip_for(path, error, opened=True, position=position)
        days = [frame.day for frame in frames if frame.day is not None]
        location = next((frame.location for frame in frames if frame.location is not None), None)
        if self.days is not None and (len(days) < len(frames) or location is None):
            return Skip(position, "no date" if len(days) < len(frames) else "no location", path, bad=True)
        nodata_mask = _join_masks(image.shape, frames)
        valid: NDArray[np.bool_] | None = None
        if nodata_mask is not None:
            valid = np.logical_not(nodata_mask.any(axis=(0, 1)))
            # Also where max_nodata_fraction is 1: the mean of no pixels is undefined.
            if not valid.any() or np.logical_not(valid).mean() > self.max_nodata_fraction:
                return Skip(position, "nodata", path, bad=False)
        self._normalize(image, nodata_mask, frames)
        if self._may_overflow and not (np.isfinite(image.min()) and np.isfinite(image.max())):
            return Skip(position, "not finite", path, bad=True)
        if image.shape != padded.shape:
            added = np.subtract(padded.shape, image.shape).tolist()
            padded[...] = np.pad(image, [(0, count) for count in added], mode="reflect")
            known = np.zeros(padded.shape[2:], bool)
            known[: window.height, : window.width] = True if valid is None else valid
            valid = known
        return Tile(position, window, slot, valid, days, location)

    def _read_file(self, path: str, window: TileWindow, out: NDArray[np.float32]) -> _Frame:
        pixels = Window(window.column, window.row, window.width, window.height)
        indexes = self.bands[path]
        with self._files.open(path) as raster:
            if raster.header != self.headers[path]:
                raise FileChangedError
            nodata_mask = raster.read(indexes, pixels, self.nodata, out)
            scales = [raster.src.scales[index - 1] for index in indexes]
            offsets = [raster.src.offsets[index - 1] for index in indexes]
            if self.days is None:
                return _Frame(nodata_mask, scales, offsets, None, None)
            day = self.days.get(path) or date_from_tags(raster.src)
            return _Frame(nodata_mask, scales, offsets, day, center(raster.src, pixels))

    def _normalize(
        self, image: NDArray[np.float32], nodata_mask: NDArray[np.bool_] | None, frames: Sequence[_Frame]
    ) -> None:
        by_band = (*image.shape[:2], 1, 1)
        by_step = (-1, image.shape[1], 1, 1)  # statistics of one time step apply to every step
        scale, offset = self.scale, self.offset
        normalize(
            image,
            nodata_mask,
            _float32([value for frame in frames for value in frame.scales], by_band) if isinstance(scale, str) else scale,
            _float32([value for frame in frames for value in frame.offsets], by_band) if isinstance(offset, str) else offset,
            None if self.means is None else _float32(self.means, by_step),
            None if self.stds is None else _float32(self.stds, by_step),
        )


class _Frame(NamedTuple):
    """What one file gives to a tile beside pixels."""

    nodata_mask: NDArray[np.bool_] | None
    scales: list[float]
    offsets: list[float]
    day: Day | None
    location: tuple[float, float] | None


def _join_masks(shape: tuple[int, ...], frames: Sequence[_Frame]) -> NDArray[np.bool_] | None:
    if all(frame.nodata_mask is None for frame in frames):
        return None
    per_file = (shape[0] // len(frames), *shape[1:])
    masks = (frame.nodata_mask for frame in frames)
    return np.concatenate([np.zeros(per_file, bool) if mask is None else mask.reshape(per_file) for mask in masks])


def _float32(values: Sequence[float], shape: tuple[int, ...]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # files may store anything; what becomes infinite is skipped
        return np.array(values).astype(np.float32).reshape(shape)


def normalize(
    image: NDArray[np.float32],
    nodata_mask: NDArray[np.bool_] | None,
    scale: NDArray[np.float32] | float,
    offset: NDArray[np.float32] | float,
    means: NDArray[np.float32] | None,
    stds: NDArray[np.float32] | None,
) -> None:
    """Scale, normalize and fill nodata in place.

    Nodata is filled with the mean of the band, or that of the band in this tile where no other is known, so that it neither
    stands out nor spreads through attention.

    Args:
        image: Stored values (T, C, H, W), changed in place.
        nodata_mask: True where a band has no data (T, C, H, W); None if nowhere. No band may lack data everywhere.
        scale: Factor on the stored values, one or (T, C, 1, 1).
        offset: Added after ``scale``.
        means: Means of the scaled values, (T, C, 1, 1) or (1, C, 1, 1); None to leave them as they are.
        stds: Standard deviations, likewise; given if ``means`` are.
    """
    with np.errstate(all="ignore"):  # nodata may be any value until it is filled
        if np.any(np.not_equal(scale, 1)):
            image *= scale
        if np.any(offset):
            image += offset
        if means is not None and stds is not None:
            image -= means
            image /= stds
    if nodata_mask is None:
        return
    if means is not None:
        image[nodata_mask] = 0
        return
    for frame, mask in zip(image, nodata_mask, strict=True):
        for band, missing in zip(frame, mask, strict=True):
            if missing.any():
                band[missing] = band[~missing].mean(dtype=np.float64)  # float32 sums of large values overflow
