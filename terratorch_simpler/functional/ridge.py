"""Ridge regression with an intercept, and its leave-group-out predictions in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ridge:
    """A ridge regression for every penalty, from one eigendecomposition of X'X.

    The penalty is relative: ``strength`` times the mean variance of the features times the number of rows, so that the same
    strengths suit features of any scale. The intercept is not penalized.

    Attributes:
        mean: Mean of the features, (D,), float64.
        intercept: Mean of the targets, (K,).
        vectors: Eigenvectors of the centred X'X, (D, D).
        values: Its eigenvalues, (D,).
        moments: Centred X'Y in the basis of the eigenvectors, (D, K).
    """

    mean: Tensor
    intercept: Tensor
    vectors: Tensor
    values: Tensor
    moments: Tensor

    @classmethod
    def fit(cls, features: Tensor, targets: Tensor) -> Ridge:
        """Fit.

        Args:
            features: Rows X, (N, D).
            targets: What is to be predicted, (N, K): one-hot classes or values.
        """
        features, targets = features.double(), targets.double()
        mean, intercept = features.mean(dim=0), targets.mean(dim=0)
        centred = features - mean
        values, vectors = torch.linalg.eigh(centred.mT @ centred)
        return cls(mean, intercept, vectors, values.clamp(min=0), vectors.mT @ (centred.mT @ (targets - intercept)))

    def penalty(self, strength: float) -> float:
        """The penalty on the squared coefficients."""
        return strength * max(float(self.values.mean()), torch.finfo(torch.float64).tiny)

    def predict(self, features: Tensor, strength: float) -> Tensor:
        """Predictions (M, K) for the rows of ``features``, (M, D)."""
        rotated = (features.double() - self.mean) @ self.vectors
        predicted: Tensor = self.intercept + rotated @ (self.moments / (self.values + self.penalty(strength))[:, None])
        return predicted

    def leave_group_out(self, features: Tensor, targets: Tensor, groups: Tensor, strengths: list[float]) -> Tensor:
        """Predictions for every row by the regression that is fitted without any row of its group.

        Nothing is fitted again: for the rows g of a group, y_g - prediction = (I - H_gg)^-1 (y_g - fitted_g) with the hat
        matrix H = 1/N + X (X'X + penalty)^-1 X' of the fit to all rows (X centred). It is the leave-one-out identity of
        Allen's PRESS for blocks of rows; the penalty stays that of all rows.

        Args:
            features: The rows of the fit, (N, D).
            targets: Their targets, (N, K).
            groups: Group of every row, (N,), int64.
            strengths: S strengths.

        Returns:
            float64 of shape (S, N, K).
        """
        targets = targets.double()
        rotated = (features.double() - self.mean) @ self.vectors
        predictions = torch.empty(len(strengths), *targets.shape, dtype=torch.float64)
        members = [(groups == group).nonzero().flatten() for group in groups.unique()]
        for number, strength in enumerate(strengths):
            scale = self.values + self.penalty(strength)
            fitted = self.intercept + rotated @ (self.moments / scale[:, None])
            for rows in members:
                # H_gg = factor @ factor.T
                ones = torch.full((len(rows), 1), len(targets) ** -0.5, dtype=torch.float64)
                factor = torch.cat([ones, rotated[rows] / scale.sqrt()], dim=1)
                residual = targets[rows] - fitted[rows]
                predictions[number, rows] = targets[rows] - _solve_complement(factor, residual)
        return predictions


def _solve_complement(factor: Tensor, right: Tensor) -> Tensor:
    """(I - F F')^-1 R, by Woodbury's identity where F has more rows than columns."""
    rows, columns = factor.shape
    if rows <= columns:
        solved: Tensor = torch.linalg.solve(torch.eye(rows, dtype=factor.dtype) - factor @ factor.mT, right)
        return solved
    inner = torch.eye(columns, dtype=factor.dtype) - factor.mT @ factor
    solved = right + factor @ torch.linalg.solve(inner, factor.mT @ right)
    return solved
