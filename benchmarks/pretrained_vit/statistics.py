"""Scores from confusion matrices, regret, and what noise alone could do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.05
"""Depths are not ranked where the F test gives a larger p."""
GATE = 0.02
"""By how much pretrained weights must beat random ones for a task to count."""


def confusion(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], place: NDArray[np.int64], places: int, classes: int
) -> NDArray[np.int64]:
    """Confusion matrix of every place, (places, classes, classes): rows are the truth."""
    counts = np.zeros((places, classes, classes), np.int64)
    np.add.at(counts, (place, truth, predicted), 1)
    return counts


def score(counts: NDArray[Any], accuracy: bool) -> NDArray[np.float64]:
    """Mean IoU over the classes that occur, or accuracy, of confusion matrices (..., classes, classes)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    if accuracy:
        share: NDArray[np.float64] = hits.sum(-1) / counts.sum((-2, -1))
        return share
    truth, union = counts.sum(-1), counts.sum(-1) + counts.sum(-2) - hits
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.where(truth > 0, hits / union, np.nan), -1)


def f_test(scores: NDArray[np.float64]) -> tuple[float, float]:
    """F and p of the hypothesis that all depths are equal, with seeds as blocks: scores (seeds, depths)."""
    seeds, depths = scores.shape
    total = scores.mean()
    by_depth, by_seed = scores.mean(0), scores.mean(1)
    between = seeds * np.sum((by_depth - total) ** 2) / (depths - 1)
    rest = np.sum((scores - by_depth - by_seed[:, None] + total) ** 2) / ((depths - 1) * (seeds - 1))
    with np.errstate(divide="ignore", invalid="ignore"):  # seeds that agree exactly leave no rest
        f = float(between / rest)
    return f, float(stats.f.sf(f, depths - 1, (depths - 1) * (seeds - 1)))


def regrets(scores: NDArray[np.float64], chosen: NDArray[np.int64], depths: int) -> NDArray[np.float64]:
    """What each seed's choice loses against the depth that is best for the *other* seeds.

    Args:
        scores: Test scores (..., seeds, columns); the first columns are the depths, and others follow.
        chosen: Column that is chosen in each seed, (seeds,).
        depths: Number of depths.

    Returns:
        (..., seeds); negative where the choice is better on a seed than the best depth of the others.
    """
    alone = scores[..., :depths]
    best = (alone.sum(-2, keepdims=True) - alone).argmax(-1)
    lost: NDArray[np.float64] = _pick(scores, best) - _pick(scores, np.broadcast_to(chosen, best.shape))
    return lost


def gains(scores: NDArray[np.float64], chosen: NDArray[np.int64], depths: int) -> NDArray[np.float64]:
    """What each seed's choice gains on all blocks, (..., seeds); arguments as of :func:`regrets`."""
    gained: NDArray[np.float64] = _pick(scores, np.broadcast_to(chosen, scores.shape[:-1])) - scores[..., depths - 1]
    return gained


def _pick(scores: NDArray[np.float64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.take_along_axis(scores, columns[..., None], -1)[..., 0]


class Bootstrap:
    """Samples over places of the test split and over seeds (which images are labelled) at once.

    Samples are the same for every case with as many places and seeds, so that tasks on the same tiles may be averaged.

    Args:
        counts: Confusion matrices on the test split, (seeds, columns, places, classes, classes).
        accuracy: Whether the score is accuracy rather than mean IoU.
        resamples: Number of samples.
    """

    def __init__(self, counts: NDArray[np.int64], accuracy: bool, resamples: int = RESAMPLES) -> None:
        rng = np.random.default_rng(0)
        seeds, columns, places, classes, _ = counts.shape
        weights = rng.multinomial(places, np.full(places, 1 / places), size=resamples)
        self._seeds = rng.integers(seeds, size=(resamples, seeds))
        by_place = np.moveaxis(counts, 2, 0).reshape(places, -1)
        self.scores = score((weights @ by_place).reshape(resamples, seeds, columns, classes, classes), accuracy)
        """Scores of every seed on every sample of places, (resamples, seeds, columns)."""

    def mean(self, of_seeds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means over drawn seeds of a figure that every seed has, (resamples, seeds, ...), as (resamples, ...)."""
        drawn = self._seeds.reshape(*self._seeds.shape, *[1] * (of_seeds.ndim - 2))
        mean: NDArray[np.float64] = np.take_along_axis(of_seeds, drawn, 1).mean(1)
        return mean


def interval(value: float, samples: NDArray[np.float64]) -> list[float]:
    """A figure with its 95 % interval."""
    return [float(value), *np.quantile(samples, (0.025, 0.975)).tolist()]


def gate(trained: NDArray[np.float64], untrained: NDArray[np.float64]) -> tuple[list[float], bool]:
    """Whether pretraining matters: by scores on the validation split, (seeds, depths), of pretrained and random weights.

    Returns:
        What the best depth of the one gains on the best of the other, with its standard error over seeds; and whether that
        is more than ``GATE`` and two standard errors.
    """
    gain = trained[:, trained.mean(0).argmax()] - untrained[:, untrained.mean(0).argmax()]
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    return [float(gain.mean()), float(error)], bool(gain.mean() > max(GATE, 2 * error))
