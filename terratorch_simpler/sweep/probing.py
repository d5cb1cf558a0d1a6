"""Probes of frozen features: nearest neighbours and logistic regression, for all depths of a width from one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from terratorch_simpler.extraction import LabelledRows, Readout
from terratorch_simpler.lightning.labelled_images import labelled_rows
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.sweep.variants import Variant, build_variants, replace_encoder

NEIGHBOURS = 5
STEPS = 1000
"""Steps of the linear probe's optimizer: where they are not enough, the accuracy no longer changes in the digits shown."""
RESAMPLES = 1000
INTERVAL = (0.025, 0.975)
Recover = Callable[[int, Tensor], Tensor]
"""Depth c and the raw output of block c (B, N, D) at full width; gives what the last block would have returned, so far as
it is recovered without training."""


class ProbeSamples(NamedTuple):
    """Features of one encoder and the classes that they should predict.

    Attributes:
        features: (N, D).
        labels: Class of every sample, (N,).
        images: Number of the image each sample belongs to, (N,).
    """

    features: Tensor
    labels: Tensor
    images: Tensor


class Accuracy(NamedTuple):
    """Fraction of samples classified correctly, with a 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


def correct_by_probe(train: ProbeSamples, test: ProbeSamples) -> dict[str, NDArray[np.bool_]]:
    """Whether each test sample is classified correctly by two probes.

    Args:
        train: What the probes are fitted to.
        test: What they are scored on, of other images.

    Returns:
        ``knn``: five nearest neighbours by cosine; ``linear``: logistic regression on standardised features; each (N,).
    """
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train.labels)), metric="cosine")
    truth = test.labels.numpy()
    return {
        name: fit_predict(model, train, test) == truth for name, model in (("knn", neighbours), ("linear", linear_probe()))
    }


def linear_probe() -> Pipeline:
    """Logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS))


def fit_predict(model: ClassifierMixin, train: ProbeSamples, test: ProbeSamples) -> NDArray[np.int64]:
    """Predicted classes of the test samples, (N,)."""
    # The matrices are small: several threads spend more time on waiting for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.features.numpy(), train.labels.numpy())
    classes: NDArray[np.int64] = model.predict(test.features.numpy())
    return classes


def bootstrap_accuracy(correct: NDArray[Any], images: NDArray[np.int64], seed: int = 0) -> Accuracy:
    """Accuracy with a 95 % bootstrap interval; whole images are resampled, since samples of one image are alike.

    Args:
        correct: Whether each sample is classified correctly, (N,); for a gain of accuracy the difference of two such, from
            -1 to 1.
        images: Number of the image each sample belongs to, (N,).
        seed: Seed of the draws.
    """
    _, of_image = np.unique(images, return_inverse=True)
    rows, hits = np.bincount(of_image), np.bincount(of_image, weights=correct)
    drawn = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    low, high = np.quantile(drawn @ hits / (drawn @ rows), INTERVAL)
    return Accuracy(float(hits.sum() / rows.sum()), float(low), float(high))


def probe_variants(
    trainer: Trainer,
    task: LightningModule,
    intact: SimplerBackbone,
    variants: Sequence[Variant],
    seed: int,
    recover: Recover | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Probe every variant: fitted on the training images, scored on the validation images.

    The features of a depth are the output of its last block behind the encoder's final norm, which is what the encoder
    pruned there returns.

    Args:
        trainer: Gives device, precision and datamodule.
        task: The task; its encoder is replaced meanwhile.
        intact: The intact encoder.
        variants: What to probe.
        seed: Seed of images, patches and resamples.
        recover: How the first blocks at full width are recovered, if they are: they are probed with it as well.
        progress: Called with the number of variants that are done.

    Returns:
        For every variant its columns of a sweep.
    """
    results: dict[Variant, dict[str, float]] = {}
    correct: dict[Variant, dict[str, NDArray[np.bool_]]] = {}

    def features(encoder: SimplerBackbone, recover: Recover | None = None) -> list[tuple[ProbeSamples, ProbeSamples]]:
        with replace_encoder(task, encoder):
            readout = _pruned_readout(encoder, recover)
            train = labelled_rows(trainer, task, "train", seed, readout=readout)
            test = labelled_rows(trainer, task, "val", seed, readout=readout)
        return list(zip(_by_block(train), _by_block(test), strict=True))

    prefixes = [variant for variant in variants if variant.first_blocks]
    for width, of_width in groupby(prefixes, key=lambda variant: variant.width):
        depths = list(of_width)
        (encoder,) = build_variants(intact, [Variant(max((variant.kept for variant in depths), key=len), width)])
        by_depth = features(encoder)
        for variant in depths:
            train, test = by_depth[len(variant.kept) - 1]
            correct[variant] = correct_by_probe(train, test)
            results[variant] = _columns(correct[variant], test, seed)
            progress(len(results))
        if recover is not None and width == 1.0:
            recovered = features(encoder, recover)
            for variant in depths:
                train, test = recovered[len(variant.kept) - 1]
                results[variant] |= _recovered_columns(correct[variant], correct_by_probe(train, test), test, seed)
    for variant in variants:
        if variant not in results:
            (encoder,) = build_variants(intact, [variant])
            train, test = features(encoder)[-1]
            results[variant] = _columns(correct_by_probe(train, test), test, seed)
            progress(len(results))
    return [results[variant] for variant in variants]


def _pruned_readout(encoder: SimplerBackbone, recover: Recover | None) -> Readout:
    norm = encoder.final_norm or nn.Identity()

    def readout(block: int, output: Tensor) -> Tensor:
        return norm(output if recover is None else recover(block + 1, output))  # type: ignore[no-any-return]

    return readout


def _by_block(rows: LabelledRows) -> list[ProbeSamples]:
    return [ProbeSamples(features, rows.labels, rows.images) for features in rows.features]


def _columns(correct: Mapping[str, NDArray[Any]], test: ProbeSamples, seed: int) -> dict[str, float]:
    columns: dict[str, float] = {}
    for name, each in correct.items():
        found = bootstrap_accuracy(each, test.images.numpy(), seed)
        columns |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return columns


def _recovered_columns(
    before: Mapping[str, NDArray[np.bool_]], after: Mapping[str, NDArray[np.bool_]], test: ProbeSamples, seed: int
) -> dict[str, float]:
    """Accuracy with recovery, and what it gains, image by image."""
    gained = {f"{name}_gain": after[name].astype(np.int64) - before[name] for name in after}
    return {f"{name}_recovered": float(each.mean()) for name, each in after.items()} | _columns(gained, test, seed)
