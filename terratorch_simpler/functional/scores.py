"""Scores of predictions: what TerraTorch's tasks report, by torchmetrics, and their standard error over groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_jaccard_index,
    multilabel_average_precision,
)
from torchmetrics.functional.regression import r2_score

LabelKind = Literal["segmentation", "classification", "multilabel", "regression"]

METRICS: dict[LabelKind, str] = {
    "segmentation": "mean IoU",
    "classification": "accuracy",
    "multilabel": "mAP",
    "regression": "R2",
}
MOST_SUBSETS = 32
"""For a standard error groups are left out in at most so many random subsets: each needs every score again (ours)."""


def score_predictions(kind: LabelKind, predictions: Tensor, targets: Tensor) -> float:
    """Mean IoU, accuracy, mean average precision or R2; labels that do not occur do not count, and R2 of equal values is 0.

    Args:
        kind: Kind of labels.
        predictions: (N, K): a score of each class or label, or a value (K = 1).
        targets: (N, K): one-hot classes, labels that are 0 or 1, or values.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "regression":
            return _r2(predictions[:, 0].double(), targets[:, 0].double())
        if kind == "multilabel":
            # Ranks, since torchmetrics takes scores outside 0 to 1 for logits, which ties those that are far out.
            ranks = torch.stack([column.unique(return_inverse=True)[1] for column in predictions.T], dim=1)
            scaled, occurs = ranks.double() / len(ranks), targets.bool().any(dim=0)
            of_labels = multilabel_average_precision(scaled, targets.long(), targets.shape[1], average="none")
            return float(of_labels[occurs].mean()) if occurs.any() else 0.0
        predicted, classes = predictions.argmax(dim=1), targets.argmax(dim=1)
        if kind == "segmentation":
            return float(multiclass_jaccard_index(predicted, classes, targets.shape[1]))
        return float(multiclass_accuracy(predicted, classes, targets.shape[1], average="micro"))


def _r2(predictions: Tensor, targets: Tensor) -> float:
    """R2 of standardized values: torchmetrics takes small sums of squares, as of labels in small units, for none."""
    mean, scale = targets.mean(), targets.std(correction=0)
    if len(targets) < 2 or not scale > 0:
        return 0.0
    return float(r2_score((predictions - mean) / scale, (targets - mean) / scale))


def leave_out_subsets(groups: Tensor) -> Tensor:
    """Rows that remain when each subset of the groups is left out, (J, N) bool; a subset is a group, if they are few.

    Which groups make a subset is random, with a fixed seed: groups may come in an order that repeats, as of classes in turn.

    Args:
        groups: Group of every row, (N,), numbered from 0.
    """
    order = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(0))
    subsets = order[groups] % MOST_SUBSETS
    remaining: Tensor = subsets != subsets.unique()[:, None]
    return remaining


def jackknife_errors(left_out: Tensor) -> Tensor:
    """Standard error by the jackknife: sqrt((J - 1) / J * sum of squared deviations from their mean).

    Args:
        left_out: Scores without each of J subsets, (J, ...).

    Returns:
        Shape (...).
    """
    deviations = left_out - left_out.mean(dim=0)
    return ((len(left_out) - 1) / len(left_out) * deviations.square().sum(dim=0)).sqrt()


def jackknife(score: Callable[[Tensor], float], groups: Tensor) -> Tensor:
    """The score without each subset of the groups, (J,), float64.

    Args:
        score: Score of the rows in a mask (N,).
        groups: Group of every row, (N,), numbered from 0.
    """
    return torch.tensor([score(rows) for rows in leave_out_subsets(groups)], dtype=torch.float64)
