"""Scores from confusion matrices, regret, and what noise alone could do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
PERMUTATIONS = 999
FOLDS = 5
"""Parts of the test places, of which the depth to compare with is picked on all but one."""
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


def f_statistic(scores: NDArray[np.float64]) -> float:
    """F of the hypothesis that all depths are equal, with seeds as blocks: scores (seeds, depths)."""
    seeds, depths = scores.shape
    total = scores.mean()
    by_depth, by_seed = scores.mean(0), scores.mean(1)
    between = seeds * np.sum((by_depth - total) ** 2) / (depths - 1)
    rest = np.sum((scores - by_depth - by_seed[:, None] + total) ** 2) / ((depths - 1) * (seeds - 1))
    with np.errstate(divide="ignore", invalid="ignore"):  # seeds that agree exactly leave no rest
        return float(between / rest)


def f_test(counts: NDArray[np.int64], accuracy: bool) -> tuple[float, float]:
    """F, and the share of permutations whose F is at least as large.

    The tables of F take the places of the test split as given: depths would then differ in what these few places happen to
    favour. Here the depths are permuted within each place, alike for all seeds, as if none were better in general.

    Args:
        counts: Confusion matrices of the depths, (seeds, depths, places, classes, classes).
        accuracy: Whether the score is accuracy rather than mean IoU.
    """
    rng = np.random.default_rng(0)
    if accuracy:  # right and wrong are all that counts, and smaller
        right = np.trace(counts, axis1=-2, axis2=-1)
        wrong = counts.sum((-2, -1)) - right
        counts = np.stack([np.stack([right, wrong], -1), np.zeros((*right.shape, 2), np.int64)], -2)
    found = f_statistic(score(counts.sum(2), accuracy))
    at_least = 1
    for _ in range(PERMUTATIONS):
        order = rng.permuted(np.tile(np.arange(counts.shape[1])[:, None], counts.shape[2]), axis=0)
        permuted = np.take_along_axis(counts, order[None, :, :, None, None], 1)
        at_least += f_statistic(score(permuted.sum(2), accuracy)) >= found
    return found, at_least / (PERMUTATIONS + 1)


def with_reference(counts: NDArray[np.int64], depths: int, accuracy: bool) -> NDArray[np.int64]:
    """Add what choices are compared with as the last column: the depth that is best elsewhere.

    Places are in ``FOLDS`` folds. Of every seed and fold, the column holds the confusion matrices of the depth whose mean
    score in the *other* seeds on the *other* folds is highest. Picked by the scores that it is compared with, the best depth
    would look better than it is.

    Args:
        counts: Confusion matrices on the test split, (seeds, columns, places, classes, classes).
        depths: Number of columns that are depths; they come first.
        accuracy: Whether the score is accuracy rather than mean IoU.
    """
    seeds, _, places = counts.shape[:3]
    reference = np.empty_like(counts[:, :1])
    for fold in range(FOLDS):
        inside = np.arange(places) % FOLDS == fold
        scores = score(counts[:, :depths, ~inside].sum(2), accuracy)
        best = (scores.sum(0) - scores).argmax(1)
        reference[:, 0, inside] = counts[np.arange(seeds), best][:, inside]
    return np.concatenate([counts, reference], 1)


def regrets(scores: NDArray[np.float64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each seed's choice loses against the reference.

    Args:
        scores: Test scores (..., seeds, columns), the last of which is that of :func:`with_reference`.
        chosen: Column that is chosen in each seed, (seeds,).

    Returns:
        (..., seeds); negative where the choice is better.
    """
    lost: NDArray[np.float64] = scores[..., -1] - _pick(scores, np.broadcast_to(chosen, scores.shape[:-1]))
    return lost


def gains(scores: NDArray[np.float64], chosen: NDArray[np.int64], depths: int) -> NDArray[np.float64]:
    """What each seed's choice gains on all blocks, the last of the depths, (..., seeds); arguments as of :func:`regrets`."""
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


def gate(trained: NDArray[np.int64], untrained: NDArray[np.int64], accuracy: bool) -> tuple[list[float], bool]:
    """Whether pretraining matters: by the validation split, of pretrained and random weights.

    Args:
        trained: Confusion matrices of the depths, (seeds, depths, places, classes, classes), of pretrained weights.
        untrained: Those of random weights.
        accuracy: Whether the score is accuracy rather than mean IoU.

    Returns:
        What the best depth of the one gains on the best of the other, with its standard error over seeds and places; and
        whether that is more than ``GATE`` and two standard errors.
    """
    scores = [score(counts.sum(2), accuracy).mean(0) for counts in (trained, untrained)]
    best = [int(one.argmax()) for one in scores]
    pair = np.stack([trained[:, best[0]], untrained[:, best[1]]], 1)
    bootstrap = Bootstrap(pair, accuracy)
    gain = float(scores[0][best[0]] - scores[1][best[1]])
    error = float(bootstrap.mean(bootstrap.scores[..., 0] - bootstrap.scores[..., 1]).std())
    return [gain, error], gain > max(GATE, 2 * error)
