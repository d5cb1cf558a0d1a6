"""Pixels of a window made ready for an encoder: scaled, normalised, gaps filled, padded. Arrays only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Statistics(NamedTuple):
    """Means and standard deviations of the bands, (T, C, 1, 1) or (1, C, 1, 1) each."""

    means: NDArray[np.float32]
    stds: NDArray[np.float32]


def normalize(
    image: NDArray[np.float32],
    lacks: NDArray[np.bool_] | None,
    scale: NDArray[np.float32] | float,
    offset: NDArray[np.float32] | float,
    statistics: Statistics | None,
) -> None:
    """Scale, normalise and fill in place.

    A gap gets the mean of its band, of the tile where no other is known, so that it neither stands out nor spreads
    through attention.

    Args:
        image: Stored values (T, C, H, W), changed in place.
        lacks: Where a band has no data (T, C, H, W); None if nowhere. No band may lack data everywhere.
        scale: Factor on the stored values, one or (T, C, 1, 1).
        offset: Added after ``scale``.
        statistics: Means and standard deviations of the scaled values; None to leave them as they are.
    """
    with np.errstate(all="ignore"):  # gaps may hold anything until they are filled
        if np.any(np.not_equal(scale, 1)):
            image *= scale
        if np.any(offset):
            image += offset
        if statistics is not None:
            image -= statistics.means
            image /= statistics.stds
    if lacks is None:
        return
    if statistics is not None:
        image[lacks] = 0
        return
    for frame, gaps in zip(image, lacks, strict=True):
        for band, gap in zip(frame, gaps, strict=True):
            if gap.any():
                band[gap] = band[~gap].mean(dtype=np.float64)  # the sum of large float32 values may be none


def mirror(image: NDArray[np.float32], height: int, width: int) -> None:
    """Fill an image in place from its upper left corner, mirrored at the lower and right edge of that corner.

    Args:
        image: Pixels (T, C, H, W), of which only the corner is known.
        height: Rows of the corner.
        width: Columns of the corner.
    """
    missing = [(0, 0), (0, 0), (0, image.shape[2] - height), (0, image.shape[3] - width)]
    image[...] = np.pad(image[..., :height, :width], missing, mode="reflect")
