"""Knee: keep blocks while similarity to later blocks grows faster than the fraction of blocks kept (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import TIE, Bounds, Choice, Criterion
from terratorch_simpler.criteria.statistics import Statistics
from terratorch_simpler.errors import DepthError, NoAnswerError


def knee_curve(similarity: Tensor) -> Tensor:
    """Normalized similarity to later blocks minus the fraction of blocks kept, at every depth.

    R_k is the mean of S[k, j] over the later blocks j > k, R_L = 1. The score of depth k is
    (R_k - R_1) / (1 - R_1) - k / L. If R_1 = 1, the first term is 1 at every depth.

    Args:
        similarity: Similarity of shape (..., L, L).

    Returns:
        Scores of the depths 1 to L, (..., L).

    Example:
        >>> s = torch.eye(4, dtype=torch.float64)
        >>> s[1:, 1:] = 1
        >>> knee_curve(s)
        tensor([-0.2500,  0.5000,  0.2500,  0.0000], dtype=torch.float64)
    """
    blocks = similarity.shape[-1]
    there = similarity_to_later(similarity)
    missing = 1 - there[..., :1]
    gained = torch.where(missing > TIE, (there - there[..., :1]) / missing.clamp(min=TIE), 1.0)
    return gained - torch.arange(1, blocks + 1, dtype=similarity.dtype) / blocks


def similarity_to_later(similarity: Tensor) -> Tensor:
    """R_k, the mean of S[k, j] over the later blocks j > k; R_L = 1 is a definition, not a measurement.

    Args:
        similarity: Similarity of shape (..., L, L).

    Returns:
        R of the depths 1 to L, (..., L).
    """
    blocks = similarity.shape[-1]
    later = torch.ones(blocks, blocks, dtype=similarity.dtype).triu(1)
    there = (similarity * later).sum(dim=-1) / later.sum(dim=-1).clamp(min=1)
    return torch.cat([there[..., :-1], torch.ones_like(there[..., -1:])], dim=-1)


class Knee(Criterion):
    """Keep the first k blocks, where k maximises :func:`knee_curve`. A criterion of this package, from no paper."""

    name = "knee"
    description = (
        "Keeps blocks while the similarity to later blocks grows faster than the share of blocks kept. "
        "A criterion of this package."
    )
    needs_positive_score = True  # that of all blocks is 0 by the definition of R_L

    def depths(self, num_blocks: int) -> range:
        """Any depth.

        Raises:
            DepthError: If there is only one block.
        """
        if num_blocks < 2:
            msg = "Found an encoder of 1 block, expected at least 2 to choose a depth: there is nothing to prune."
            raise DepthError(msg)
        return range(1, num_blocks + 1)

    def choose(self, statistics: Statistics | None, num_blocks: int, bounds: Bounds) -> Choice:
        """Pick the depth with the highest score, if similarity to later blocks grows with depth at all.

        Raises:
            NoAnswerError: If it falls: it is smaller for the last but one block than for the first.
        """
        assert statistics is not None  # needs_similarity is set
        choice = super().choose(statistics, num_blocks, bounds)
        there = similarity_to_later(statistics.similarity)
        if num_blocks > 2 and float(there[-2]) < float(there[0]) - TIE:
            msg = (
                f"The criterion 'knee' has no answer for this encoder: similarity to later blocks falls with depth, from "
                f"{float(there[0]):.3f} after the first block to {float(there[-2]):.3f} after block {num_blocks - 1} of "
                f"{num_blocks}, and it looks for a rise: use another criterion, or give the depth by hand."
            )
            raise NoAnswerError(msg)
        return choice

    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Score of every depth."""
        return knee_curve(statistics.similarity)[..., [depth - 1 for depth in depths]]
