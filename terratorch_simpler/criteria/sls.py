"""SLS: keep the first blocks, up to the depth where labelled features cluster almost as well as after the last block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor

from terratorch_simpler.criteria.base import Bounds, Choice, Criterion
from terratorch_simpler.criteria.statistics import LabelledFeatures, Statistics
from terratorch_simpler.errors import ConfigurationError, DegenerateFeaturesError, LabelsError

PERPLEXITY = 30
"""scikit-learn's default; t-SNE needs more rows than that."""
MOST_ROWS = 2000
"""Maximum number of embedded rows: t-SNE takes seconds for this many, and superlinear time for more (ours)."""


def silhouettes(features: Tensor, labels: Tensor) -> list[float]:
    """Silhouette score of the labels after every block, in a t-SNE embedding of its output.

    The embedding has two dimensions, starts from the first principal components and is scaled to 0..1 in each (arXiv
    2407.14330, and the code released with it).

    Args:
        features: Output of every block, (L, N, D).
        labels: Class of every row, (N,).
    """
    scores = []
    for block in features.double().numpy():
        embedded: NDArray[np.float32] = TSNE(2, perplexity=PERPLEXITY, init="pca", random_state=0).fit_transform(block)
        low, high = embedded.min(axis=0), embedded.max(axis=0)
        scores.append(float(silhouette_score((embedded - low) / (high - low), labels.numpy())))
    return scores


class Sls(Criterion):
    """Keep the first l blocks, the smallest l such that all silhouettes SC_l to SC_L are at least alpha * SC_L.

    For encoders tuned at full depth with adapters (arXiv 2407.14330). Requires labels.

    Args:
        alpha: Fraction of the last block's silhouette that a block must reach.

    Raises:
        ConfigurationError: If ``alpha`` is not above 0 and at most 1.
    """

    name = "sls"
    description = "Keeps the blocks up to where the labelled classes are almost as well separated as after the last block."
    papers: ClassVar[Mapping[str, str]] = {"2407.14330": "SLS: depth by the silhouette of labelled classes"}
    needs_labels = True

    def __init__(self, alpha: float = 0.3) -> None:
        if not 0 < alpha <= 1:
            msg = f"Found alpha {alpha} for criterion 'sls', expected a share above 0 and up to 1: change alpha."
            raise ConfigurationError(msg)
        self.alpha = alpha

    @property
    def args(self) -> dict[str, object]:  # noqa: D102
        return {"alpha": self.alpha}

    def depths(self, num_blocks: int) -> range:
        """Any depth."""
        return range(1, num_blocks + 1)

    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Silhouette SC_l of every depth l.

        Raises:
            LabelsError: If there are no labels, of one class only, or too few rows.
            DegenerateFeaturesError: If features are not finite, or the same in every row.
        """
        assert not isinstance(statistics.labelled, Mapping)  # probes_labels is not set
        rows = _some_rows(statistics.labelled)
        features = rows.features[[depth - 1 for depth in depths]]
        varies = (features != features[:, :1]).any(dim=(1, 2))
        usable = torch.isfinite(features).all(dim=(1, 2)) & varies
        if not usable.all():
            wrong = [depths[i] for i in (~usable).nonzero().flatten().tolist()]
            msg = (
                f"Found labelled features after blocks {wrong} that are not finite or all the same, expected some that "
                "vary: train with a smaller learning rate, or in higher precision."
            )
            raise DegenerateFeaturesError(msg)
        return torch.tensor(silhouettes(features, rows.labels), dtype=torch.float64)

    def choose(self, statistics: Statistics | None, num_blocks: int, bounds: Bounds) -> Choice:
        """Walk down from the last block and clamp the depth to the bounds (ours).

        Raises:
            LabelsError: If labels are missing, or their classes form no clusters after the last block.
        """
        assert statistics is not None  # needs_labels is set
        allowed = bounds.within(self.depths(num_blocks), num_blocks)
        scores = self.score(statistics, list(self.depths(num_blocks))).tolist()
        if scores[-1] <= 0:
            msg = (
                f"Found a silhouette of {scores[-1]:.3f} after the last block, expected one above 0: the classes form no "
                "clusters there, so use another criterion, or tune the encoder first and give its --ckpt_path."
            )
            raise LabelsError(msg)
        depth = num_blocks
        while depth > 1 and scores[depth - 2] >= self.alpha * scores[-1]:
            depth -= 1
        depth = min(max(depth, allowed[0]), allowed[-1])
        return Choice(tuple(range(depth)), dict(enumerate(scores, start=1)))


def _some_rows(labelled: LabelledFeatures | None) -> LabelledFeatures:
    """A seeded sample of at most ``MOST_ROWS`` rows.

    Raises:
        LabelsError: If there are no labels, of one class only, or too few rows.
    """
    if labelled is None:
        msg = "There are no labels for criterion 'sls', expected some: choose another one, or give the data its labels."
        raise LabelsError(msg)
    order = torch.randperm(len(labelled.labels), generator=torch.Generator().manual_seed(0))[:MOST_ROWS].sort().values
    rows = LabelledFeatures(labelled.features[:, order], labelled.labels[order])
    if len(rows.labels) <= PERPLEXITY:
        msg = (
            f"Found {len(rows.labels)} rows with labels for criterion 'sls', expected more than {PERPLEXITY}, the "
            "perplexity of t-SNE: give more labelled images."
        )
        raise LabelsError(msg)
    if not 1 < (classes := len(set(rows.labels.tolist()))) < len(rows.labels):
        msg = (
            f"Found {classes} classes in {len(rows.labels)} rows for criterion 'sls', expected two at least "
            "and fewer than rows: check the labels."
        )
        raise LabelsError(msg)
    return rows
