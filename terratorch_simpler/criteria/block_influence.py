"""Block influence: drop the blocks that change the direction of tokens least, at any position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import TIE, BudgetCriterion
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
    """Drop the blocks with the lowest influence; the kept blocks may have gaps.

    Of blocks with the same influence the later ones are dropped (ours).
    """

    name = "block_influence"
    description = (
        "Drops the blocks that turn their input least: one minus the mean cosine of a token before and after. "
        "The kept blocks may have gaps."
    )
    papers: ClassVar[Mapping[str, str]] = {"2403.03853": "ShortGPT: block influence"}

    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Minus the summed influence of the dropped blocks."""
        lowest = block_influence(statistics.cosine).sort(dim=-1).values.cumsum(dim=-1)
        return -lowest[..., [statistics.num_blocks - depth - 1 for depth in depths]]

    def kept(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """The blocks with the highest influence."""
        left = block_influence(statistics.cosine).clone()
        rank = torch.zeros_like(left, dtype=torch.int64)  # how many blocks are dropped before each
        for dropped_before in range(statistics.num_blocks):
            lowest = left <= left.amin(dim=-1, keepdim=True) + TIE
            last = statistics.num_blocks - 1 - lowest.flip(-1).int().argmax(dim=-1, keepdim=True)
            rank.scatter_(-1, last, dropped_before)
            left.scatter_(-1, last, torch.inf)
        dropped = statistics.num_blocks - torch.tensor(depths)
        return rank[..., None, :] >= dropped[:, None]
