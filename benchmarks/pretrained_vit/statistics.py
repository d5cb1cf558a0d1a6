"""Scores from confusion matrices, regret, and what noise alone could do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CHUNK = 100
"""Samples that are scored at once."""
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
        share: NDArray[np.float64] = hits.sum(-1) / np.maximum(counts.sum((-2, -1)), 1)
        return share
    truth, predicted = counts.sum(-1), counts.sum(-2)
    overlap = hits / np.maximum(truth + predicted - hits, 1)  # 0 for a class that does not occur
    mean: NDArray[np.float64] = overlap.sum(-1) / np.maximum((truth > 0).sum(-1), 1)
    return mean


def right_and_wrong(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Smaller confusion matrices (..., 2, 2) of the same accuracy."""
    right = np.trace(counts, axis1=-2, axis2=-1)
    wrong = counts.sum((-2, -1)) - right
    return np.stack([np.stack([right, wrong], -1), np.zeros((*right.shape, 2), np.int64)], -2)


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
    counts = right_and_wrong(counts) if accuracy else counts
    found = f_statistic(score(counts.sum(2), accuracy))
    at_least = 1
    for _ in range(PERMUTATIONS):
        order = rng.permuted(np.tile(np.arange(counts.shape[1])[:, None], counts.shape[2]), axis=0)
        permuted = np.take_along_axis(counts, order[None, :, :, None, None], 1)
        at_least += f_statistic(score(permuted.sum(2), accuracy)) >= found
    return found, at_least / (PERMUTATIONS + 1)


def regrets(scores: NDArray[np.float64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each seed's choice loses against the reference.

    Args:
        scores: Test scores (..., seeds, columns), the last of which is the reference of :class:`Bootstrap`.
        chosen: Column that is chosen in each seed, (seeds,).

    Returns:
        (..., seeds); negative where the choice is better.
    """
    lost: NDArray[np.float64] = scores[..., -1] - _pick(scores, np.broadcast_to(chosen, scores.shape[:-1]))
    return lost


def _pick(scores: NDArray[np.float64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.take_along_axis(scores, columns[..., None], -1)[..., 0]


class Bootstrap:
    """Samples over places of the test split and over seeds (which images are labelled) at once.

    Samples are the same for every case with as many places and seeds, so that tasks on the same tiles may be averaged.

    With ``depths``, a last column is what choices are compared with: the depth that is best elsewhere. Places are in
    ``FOLDS`` folds. Of every seed and fold, it counts the depth whose mean score in the *other* seeds on the *other* folds
    is highest: picked by the scores that it is compared with, the best depth would look better than it is. It is picked
    anew in every sample. Picked with noise, it is no better than the depth that is truly best, and mostly worse.

    Args:
        counts: Confusion matrices on the test split, (seeds, columns, places, classes, classes).
        accuracy: Whether the score is accuracy rather than mean IoU.
        depths: Number of columns that are depths; they come first. 0 for no reference.
        resamples: Number of samples.
    """

    def __init__(self, counts: NDArray[np.int64], accuracy: bool, depths: int = 0, resamples: int = RESAMPLES) -> None:
        rng = np.random.default_rng(0)
        seeds, _, places = counts.shape[:3]
        weights = rng.multinomial(places, np.full(places, 1 / places), size=resamples)
        self._seeds = rng.integers(seeds, size=(resamples, seeds))
        counts = right_and_wrong(counts) if accuracy else counts
        parts = [weights[start : start + CHUNK] for start in range(0, resamples, CHUNK)]
        self.scores = np.concatenate([_scores(counts, part, accuracy, depths) for part in parts])
        """Scores of every seed on every sample of places, (resamples, seeds, columns)."""
        self.measured = _scores(counts, np.ones((1, places), np.int64), accuracy, depths)[0]
        """Scores of every seed on the places as they are, (seeds, columns)."""

    def difference(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> list[float]:
        """By how much one choice scores higher than another, with its 95 % interval.

        Args:
            one: Column that is chosen in each seed, (seeds,).
            other: The same of the other choice.
        """
        measured, sampled = (
            _pick(scores, np.broadcast_to(one, scores.shape[:-1])) - _pick(scores, np.broadcast_to(other, scores.shape[:-1]))
            for scores in (self.measured, self.scores)
        )
        return interval(float(measured.mean()), self.mean(sampled))

    def mean(self, of_seeds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means over drawn seeds of a figure that every seed has, (resamples, seeds, ...), as (resamples, ...)."""
        drawn = self._seeds.reshape(*self._seeds.shape, *[1] * (of_seeds.ndim - 2))
        mean: NDArray[np.float64] = np.take_along_axis(of_seeds, drawn, 1).mean(1)
        return mean


def _scores(counts: NDArray[np.int64], weights: NDArray[np.int64], accuracy: bool, depths: int) -> NDArray[np.float64]:
    """Scores (R, seeds, columns) where place n counts ``weights[:, n]`` times; with the reference, if there are depths."""
    seeds, columns, places, classes, _ = counts.shape
    by_place = np.moveaxis(counts, 2, 0).reshape(places, -1)
    folds = [np.arange(fold, places, FOLDS) for fold in range(FOLDS)]
    by_fold = [(weights[:, fold] @ by_place[fold]).reshape(len(weights), seeds, columns, classes, classes) for fold in folds]
    total = np.sum(by_fold, axis=0)
    scores = score(total, accuracy)
    if not depths:
        return scores
    reference = np.zeros_like(total[:, :, 0])
    for fold in by_fold:
        elsewhere = score((total - fold)[:, :, :depths], accuracy)
        best = (elsewhere.sum(1, keepdims=True) - elsewhere).argmax(2)
        reference += np.take_along_axis(fold, best[:, :, None, None, None], 2)[:, :, 0]
    return np.concatenate([scores, score(reference, accuracy)[..., None]], -1)


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
