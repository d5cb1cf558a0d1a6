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
"""Groups are left out in at most so many subsets for a standard error: each needs every score again (ours)."""


def format_score(value: float) -> str:
    """A score with three decimals, as everywhere that one is shown; with one digit if it is smaller, or as 1e+300.

    Args:
        value: A score or its standard error.

    Example:
        >>> format_score(0.85), format_score(0.0), format_score(0.0004), format_score(-3e7)
        ('0.850', '0.000', '0.0004', '-3e+07')
    """
    size = abs(value)
    if size == 0 or 0.0005 <= size < 1e4:
        return f"{value:.3f}"
    return f"{value:.1g}" if size < 1 else f"{value:.3g}"


def score_predictions(kind: LabelKind, predictions: Tensor, targets: Tensor) -> float:
    """Mean IoU, accuracy, mean average precision or R2.

    Args:
        kind: Kind of labels.
        predictions: (N, K): a score of each class or label, or a value (K = 1).
        targets: (N, K): one-hot classes, labels that are 0 or 1, or values.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels that a subset lacks are left out of the mean
        if kind == "regression":
            return float(r2_score(predictions[:, 0], targets[:, 0]))
        if kind == "multilabel":
            # Ranks, since torchmetrics takes scores outside 0 to 1 for logits, which ties those that are far out.
            ranks = torch.stack([column.unique(return_inverse=True)[1] for column in predictions.T], dim=1)
            scaled = ranks.double() / len(ranks)
            return float(multilabel_average_precision(scaled, targets.long(), targets.shape[1]))
        predicted, classes = predictions.argmax(dim=1), targets.argmax(dim=1)
        if kind == "segmentation":
            return float(multiclass_jaccard_index(predicted, classes, targets.shape[1]))
        return float(multiclass_accuracy(predicted, classes, targets.shape[1], average="micro"))


def leave_out_subsets(groups: Tensor) -> Tensor:
    """Rows that remain when each subset of the groups is left out, (J, N) bool; a subset is a group, if they are few.

    Args:
        groups: Group of every row, (N,), numbered from 0.
    """
    subsets = groups % MOST_SUBSETS
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
