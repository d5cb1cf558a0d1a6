"""How rich the output of every block is: how much lies in one direction, in how many, and how alike features are."""

from __future__ import annotations

import torch
from torch import Tensor

from terratorch_simpler.functional.least_squares import NormalEquations
from terratorch_simpler.sweep.rows import Row

BLOCK_COLUMNS = ("block", "explained_variance", "effective_dimension", "feature_correlation")


def explained_variance(covariance: Tensor) -> Tensor:
    """Share of the variance that lies along the first principal component: largest eigenvalue over the trace.

    Args:
        covariance: (..., D, D).
    """
    largest: Tensor = torch.linalg.eigvalsh(covariance)[..., -1]
    return largest / _trace(covariance)


def effective_dimension(covariance: Tensor) -> Tensor:
    """Participation ratio (sum e)^2 / sum e^2 of the eigenvalues e: 1 for one direction, D if all are alike.

    Args:
        covariance: (..., D, D).
    """
    return _trace(covariance) ** 2 / covariance.square().sum(dim=(-2, -1))


def feature_correlation(covariance: Tensor) -> Tensor:
    """Mean absolute correlation between two features; those that do not vary are left out.

    Args:
        covariance: (D, D).
    """
    varying = covariance.diagonal() > 0
    covariance = covariance[varying][:, varying]
    scale = covariance.diagonal().rsqrt()
    correlation = (covariance * scale[:, None] * scale).abs()
    pairs = len(scale) * (len(scale) - 1)
    return (correlation.sum() - correlation.trace()) / pairs


def _trace(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def diagnose_blocks(patches: NormalEquations, num_blocks: int) -> list[Row]:
    """Look at the raw output of every block, over the patch tokens that the selection has drawn.

    Args:
        patches: Sums over them, for a span from every block to the last one.
        num_blocks: Blocks of the intact encoder.
    """
    covariances = [patches.covariance(block) for block in range(1, num_blocks + 1)]
    return [
        {
            "block": number,
            "explained_variance": float(explained_variance(covariance)),
            "effective_dimension": float(effective_dimension(covariance)),
            "feature_correlation": float(feature_correlation(covariance)),
        }
        for number, covariance in enumerate(covariances)
    ]
