"""How rich the output of every block is: how much lies in one direction, in how many, and how alike features are."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.measure import IMAGES
from terratorch_simpler.selection import stream_rows
from terratorch_simpler.sweep.rows import Row
from terratorch_simpler.sweep.variants import exchanged
from terratorch_simpler.tiles import GeoTiffTiles

BLOCK_COLUMNS = ("block", "explained_variance", "effective_dimension", "feature_correlation")


class Covariances:
    """Adds up, over rows, the covariance of the features after every block, in float64."""

    def __init__(self) -> None:
        """Nothing is added yet."""
        self._rows = 0
        self._shift = self._sum = self._products = torch.empty(0)

    def add(self, features: Tensor) -> None:
        """Add rows.

        Args:
            features: Rows after every block, (L, R, D), any R.
        """
        wide = features.double()
        if not self._rows:  # near the mean, so that squares do not cancel
            self._shift = wide.mean(dim=1, keepdim=True)
            self._sum = wide.new_zeros(wide.shape[0], wide.shape[2])
            self._products = wide.new_zeros(wide.shape[0], wide.shape[2], wide.shape[2])
        wide = wide - self._shift
        self._rows += wide.shape[1]
        self._sum += wide.sum(dim=1)
        for products, block in zip(self._products, wide, strict=True):
            products.addmm_(block.T, block)

    def compute(self) -> Tensor:
        """Covariances, (L, D, D)."""
        mean = self._sum / self._rows
        return self._products / self._rows - mean[:, :, None] * mean[:, None, :]


def explained_variance(covariance: Tensor) -> Tensor:
    """Share of the variance that lies along the first principal component: largest eigenvalue over the trace.

    Args:
        covariance: (..., D, D).
    """
    return torch.linalg.eigvalsh(covariance)[..., -1] / _trace(covariance)


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


def diagnose_blocks(
    trainer: Trainer, task: LightningModule, intact: SimplerBackbone, tiles: GeoTiffTiles | None, seed: int
) -> list[Row]:
    """Look at the raw output of every block of the intact encoder, over patch tokens of the tiles of the selection.

    Args:
        trainer: Gives device, precision and datamodule.
        task: The task; its encoder is exchanged meanwhile.
        intact: The intact encoder.
        tiles: Tiles given by the user; None for the datamodule's training images.
        seed: Seed of tiles and patches.
    """
    covariances = Covariances()
    with exchanged(task, intact):
        stream_rows(trainer, task, tiles, seed, IMAGES, covariances.add)
    return [
        {
            "block": number,
            "explained_variance": float(explained_variance(covariance)),
            "effective_dimension": float(effective_dimension(covariance)),
            "feature_correlation": float(feature_correlation(covariance)),
        }
        for number, covariance in enumerate(covariances.compute(), start=1)
    ]
