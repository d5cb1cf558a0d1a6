"""Reads one window after the other: pixels, gaps, time and place, or the reason why it cannot be used."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from terratorch_simpler.data.buffers import Slot
from terratorch_simpler.data.failures import FileChangedError, unusable
from terratorch_simpler.data.index import TileWindow
from terratorch_simpler.data.metadata import centre, day_in_tags
from terratorch_simpler.data.pixels import Statistics, mirror, normalize
from terratorch_simpler.data.rasters import Header, OpenFiles
from terratorch_simpler.data.source import Unusable

Day = tuple[int, int]
"""Year, and day of the year from 0."""


class Job(NamedTuple):
    """A window to read: its place in the stream, and where its pixels go."""

    position: int
    place: TileWindow
    slot: Slot

    def __str__(self) -> str:
        return self.place.paths[0]


class Tile(NamedTuple):
    """A window that was read; valid (H, W) is None where all pixels hold data."""

    position: int
    place: TileWindow
    slot: Slot
    valid: NDArray[np.bool_] | None
    days: list[Day]
    location: tuple[float, float] | None


class Scaling(NamedTuple):
    """What stored values are multiplied with, and so on; "file" stands for what the file says."""

    scale: float | str
    offset: float | str
    means: Sequence[float] | None
    stds: Sequence[float] | None


class WindowReader:
    """Reads windows from files that stay open, in any thread.

    Args:
        headers: What the files were found to be.
        bands: Bands to read of every file, from 1.
        num_frames: Time steps, each a file of the place or stacked in its bands.
        nodata: Value that means no data; None for the file's own.
        max_nodata_fraction: Share of pixels that may lack data.
        scaling: What is done to the values.
        days: Days of the files whose names tell them, if time and place are wanted; the other files' tags tell.
        timeout: Seconds after which a failed read is called timed out.
    """

    def __init__(
        self,
        headers: Mapping[str, Header],
        bands: Mapping[str, Sequence[int]],
        num_frames: int,
        nodata: float | None,
        max_nodata_fraction: float,
        scaling: Scaling,
        days: Mapping[str, Day] | None,
        timeout: float,
    ) -> None:
        self._headers = headers
        self._bands = bands
        self._num_frames = num_frames
        self._nodata = nodata
        self._max_nodata_fraction = max_nodata_fraction
        self._scaling = scaling
        # Values that are only converted to float32 were checked for that.
        self._may_overflow = scaling != Scaling(1.0, 0.0, None, None)
        self._days = days
        self._timeout = timeout
        self._files = OpenFiles(located=days is not None)
        self._hung: set[str] = set()

    def __enter__(self) -> WindowReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files."""
        self._files.close()

    def give_up(self, job: Job) -> None:
        """Leave alone the files of a window whose read does not end, and the memory it may still write to."""
        self._hung.update(job.place.paths)
        job.slot.buffer.tainted = True

    def read(self, job: Job) -> Tile | Unusable:
        """Read one window into its slot.

        Args:
            job: Window and slot, (C, H, W) or (C, T, H, W).

        Returns:
            The tile, or why there is none.
        """
        place, pixels = job.place, job.slot.pixels
        whole = pixels.swapaxes(0, 1) if self._num_frames > 1 else pixels[None]  # (T, C, H, W)
        image = whole[..., : place.height, : place.width]
        started, path = time.monotonic(), ""
        reads: list[_Read] = []
        try:
            for path, frames in zip(place.paths, np.split(image, len(place.paths)), strict=True):
                if path in self._hung:
                    return Unusable(path, "timed out", True)
                reads.append(self._read_file(path, place, frames))
        except Exception as error:  # whatever a file can cause
            late = time.monotonic() - started >= self._timeout
            return Unusable(path, "timed out", True) if late else unusable(path, error, opened=True)
        days = [read.day for read in reads if read.day is not None]
        location = next((read.location for read in reads if read.location is not None), None)
        if self._days is not None and (len(days) < len(reads) or location is None):
            return Unusable(path, "no date" if len(days) < len(reads) else "no location", True)
        lacks = _gaps(image.shape, reads)
        valid: NDArray[np.bool_] | None = None
        if lacks is not None:
            valid = np.logical_not(lacks.any(axis=(0, 1)))
            # Also where max_nodata_fraction is 1: of nothing there is no mean.
            if not valid.any() or np.logical_not(valid).mean() > self._max_nodata_fraction:
                return Unusable(path, "nodata", False)
        self._normalize(image, lacks, reads)
        if self._may_overflow and not (np.isfinite(image.min()) and np.isfinite(image.max())):
            return Unusable(path, "not finite", True)
        if image.shape != whole.shape:
            mirror(whole, place.height, place.width)
            known = np.zeros(whole.shape[2:], bool)
            known[: place.height, : place.width] = True if valid is None else valid
            valid = known
        return Tile(job.position, place, job.slot, valid, days, location)

    def _read_file(self, path: str, place: TileWindow, frames: NDArray[np.float32]) -> _Read:
        window = Window(place.column, place.row, place.width, place.height)
        indexes = self._bands[path]
        with self._files.borrow(path) as raster:
            if raster.header != self._headers[path]:
                raise FileChangedError
            gaps = raster.read(indexes, window, self._nodata, frames)
            scales = [raster.src.scales[index - 1] for index in indexes]
            offsets = [raster.src.offsets[index - 1] for index in indexes]
            if self._days is None:
                return _Read(gaps, scales, offsets, None, None)
            return _Read(gaps, scales, offsets, self._days.get(path) or day_in_tags(raster.src), centre(raster.src, window))

    def _normalize(self, image: NDArray[np.float32], lacks: NDArray[np.bool_] | None, reads: Sequence[_Read]) -> None:
        scale, offset, means, stds = self._scaling
        by_band = (*image.shape[:2], 1, 1)
        by_step = (-1, image.shape[1], 1, 1)  # statistics of one time step serve every step
        normalize(
            image,
            lacks,
            _array([value for read in reads for value in read.scales], by_band) if isinstance(scale, str) else scale,
            _array([value for read in reads for value in read.offsets], by_band) if isinstance(offset, str) else offset,
            None if means is None or stds is None else Statistics(_array(means, by_step), _array(stds, by_step)),
        )


class _Read(NamedTuple):
    """What one file told."""

    gaps: NDArray[np.bool_] | None
    scales: list[float]
    offsets: list[float]
    day: Day | None
    location: tuple[float, float] | None


def _gaps(shape: tuple[int, ...], reads: Sequence[_Read]) -> NDArray[np.bool_] | None:
    """Where bands lack data (T, C, H, W), or None if nowhere."""
    if all(read.gaps is None for read in reads):
        return None
    per_file = (shape[0] // len(reads), *shape[1:])
    return np.concatenate([np.zeros(per_file, bool) if r.gaps is None else r.gaps.reshape(per_file) for r in reads])


def _array(values: Sequence[float], shape: tuple[int, ...]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # files may say anything; what becomes infinite is counted
        return np.array(values).astype(np.float32).reshape(shape)
