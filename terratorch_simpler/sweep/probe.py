"""How well frozen features tell classes apart: nearest neighbours and a linear probe, as good as their images allow."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

NEIGHBOURS = 5
STEPS = 1000
"""Steps of the linear probe's optimizer: where they are not enough, the accuracy no longer changes in the digits shown."""
RESAMPLES = 1000
INTERVAL = (0.025, 0.975)


class Rows(NamedTuple):
    """Features of one way of slimming.

    Attributes:
        features: (N, D).
        labels: Class of every row, (N,).
        images: Number of the image every row is of, (N,).
    """

    features: Tensor
    labels: Tensor
    images: Tensor


class Accuracy(NamedTuple):
    """Share of rows whose class is told rightly, with a 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


def probe(train: Rows, test: Rows, seed: int = 0) -> dict[str, Accuracy]:
    """Accuracy of both probes, trained on some images and judged on others.

    Args:
        train: What the probes are fitted to.
        test: What they are judged on.
        seed: Seed of the bootstrap.

    Returns:
        ``knn``: five nearest neighbours by cosine; ``linear``: logistic regression on standardised features.
    """
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train.labels)), metric="cosine")
    found = {}
    for name, model in (("knn", neighbours), ("linear", linear_probe())):
        right = told(model, train, test) == test.labels.numpy()
        found[name] = accuracy(right, test.images.numpy(), seed)
    return found


def linear_probe() -> Pipeline:
    """Logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS))


def told(model: ClassifierMixin, train: Rows, test: Rows) -> NDArray[np.int64]:
    """Classes that a probe fitted to some rows tells of others, (N,)."""
    # The matrices are small: several threads spend more time on waiting for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.features.numpy(), train.labels.numpy())
    classes: NDArray[np.int64] = model.predict(test.features.numpy())
    return classes


def accuracy(right: NDArray[np.bool_], images: NDArray[np.int64], seed: int = 0) -> Accuracy:
    """Share of rows that are right; whole images are drawn again with replacement, since the rows of one are alike.

    Args:
        right: Whether each row is right, (N,).
        images: Number of the image every row is of, (N,).
        seed: Seed of the draws.
    """
    _, of_image = np.unique(images, return_inverse=True)
    rows, hits = np.bincount(of_image), np.bincount(of_image, weights=right)
    drawn = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    low, high = np.quantile(drawn @ hits / (drawn @ rows), INTERVAL)
    return Accuracy(float(hits.sum() / rows.sum()), float(low), float(high))
