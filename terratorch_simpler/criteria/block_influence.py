"""Block influence: drop the blocks that turn the tokens least, wherever they are."""

from __future__ import annotations

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import TIE
from terratorch_simpler.criteria.budget import BudgetCriterion
from terratorch_simpler.criteria.statistics import Statistics


def block_influence(cosine: Tensor) -> Tensor:
    """Influence of every block, BI_l = 1 - mean token cosine(H_{l-1}, H_l) (ShortGPT, arXiv 2403.03853, section 2).

    Args:
        cosine: Mean token cosines of all states, (..., L + 1, L + 1).

    Returns:
        Influence of shape (..., L).
    """
    return 1 - cosine.diagonal(offset=1, dim1=-2, dim2=-1)


class BlockInfluence(BudgetCriterion):
    """Drop the blocks of the lowest influence; what is kept may have gaps.

    Of blocks with the same influence the later ones are dropped (ours).
    """

    name = "block_influence"

    def score(self, found: Statistics, depths: list[int]) -> Tensor:
        """Minus the sum of the influence of what is dropped."""
        lowest = block_influence(found.cosine).sort(dim=-1).values.cumsum(dim=-1)
        return -lowest[..., [found.num_blocks - depth - 1 for depth in depths]]

    def kept(self, found: Statistics, depths: list[int]) -> Tensor:
        """The blocks of the highest influence."""
        left = block_influence(found.cosine).clone()
        rank = torch.zeros_like(left, dtype=torch.int64)  # how many blocks are dropped before each
        for dropped_before in range(found.num_blocks):
            lowest = left <= left.amin(dim=-1, keepdim=True) + TIE
            last = found.num_blocks - 1 - lowest.flip(-1).int().argmax(dim=-1, keepdim=True)
            rank.scatter_(-1, last, dropped_before)
            left.scatter_(-1, last, torch.inf)
        dropped = found.num_blocks - torch.tensor(depths)
        return rank[..., None, :] >= dropped[:, None]
