"""Knee: keep what pays for itself, with no budget (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import TIE, Criterion
from terratorch_simpler.criteria.statistics import Statistics
from terratorch_simpler.errors import DepthError


def knee_curve(similarity: Tensor) -> Tensor:
    """How far the share of what is there already lies above the share of blocks spent, at every depth.

    R_k is the mean of S[k, j] over the blocks j > k that would follow, R_L = 1. The score of depth k is
    (R_k - R_1) / (1 - R_1) - k / L. Where all is there after the first block, R_1 = 1, the first term is 1 throughout.

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
    later = torch.ones(blocks, blocks, dtype=similarity.dtype).triu(1)
    there = (similarity * later).sum(dim=-1) / later.sum(dim=-1).clamp(min=1)
    there = torch.cat([there[..., :-1], torch.ones_like(there[..., -1:])], dim=-1)
    missing = 1 - there[..., :1]
    gained = torch.where(missing > TIE, (there - there[..., :1]) / missing.clamp(min=TIE), 1.0)
    return gained - torch.arange(1, blocks + 1, dtype=similarity.dtype) / blocks


class Knee(Criterion):
    """Keep the first k blocks, where k maximises :func:`knee_curve`. A decision of this package, from no paper."""

    name = "knee"

    def depths(self, num_blocks: int) -> range:
        """Any depth.

        Raises:
            DepthError: If there is only one block.
        """
        if num_blocks < 2:
            msg = "Found an encoder of 1 block, expected at least 2 to choose a depth: there is nothing to cut."
            raise DepthError(msg)
        return range(1, num_blocks + 1)

    def score(self, found: Statistics, depths: list[int]) -> Tensor:
        """Score of every depth."""
        return knee_curve(found.similarity)[..., [depth - 1 for depth in depths]]
