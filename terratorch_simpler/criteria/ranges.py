"""All ways to drop one or two ranges of blocks, compared at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import TIE

NOTHING = (0, 0)
"""A range of no block, which costs nothing."""


@dataclass(frozen=True)
class RangeSets:
    """For each of some depths, all sets of at most so many separated ranges that can be dropped to get there.

    A range (i, j) drops what lies between state i and state j: the blocks i to j - 1, 0-based.

    Attributes:
        num_blocks: Blocks L of the intact encoder.
        sets: For each depth, (K, 2, 2): K sets of two ranges, in the order in which ties are broken.
    """

    num_blocks: int
    sets: tuple[Tensor, ...]

    @classmethod
    def of(cls, num_blocks: int, depths: list[int], most_ranges: int) -> RangeSets:
        """List them.

        Args:
            num_blocks: Blocks L of the intact encoder.
            depths: Depths below L.
            most_ranges: 1 or 2.
        """
        return cls(num_blocks, tuple(_sets(num_blocks, num_blocks - depth, most_ranges) for depth in depths))

    def score(self, cost: Tensor) -> Tensor:
        """Minus the least cost at every depth.

        Args:
            cost: Cost of every range, (..., L + 1, L + 1), zero on the diagonal.

        Returns:
            Scores of shape (..., C).
        """
        return torch.stack([-_costs(cost, sets).amin(dim=-1) for sets in self.sets], dim=-1)

    def kept(self, cost: Tensor) -> Tensor:
        """What is kept at the least cost at every depth; ties go to the first set.

        Args:
            cost: As for :meth:`score`.

        Returns:
            Bools of shape (..., C, L).
        """
        masks = []
        for sets in self.sets:
            costs = _costs(cost, sets)
            best = (costs <= costs.amin(dim=-1, keepdim=True) + TIE).int().argmax(dim=-1)
            blocks = torch.arange(self.num_blocks)
            dropped = (sets[..., :1] <= blocks) & (blocks < sets[..., 1:])  # (K, 2, L)
            masks.append(~dropped.any(dim=1)[best])
        return torch.stack(masks, dim=-2)


def _costs(cost: Tensor, sets: Tensor) -> Tensor:
    return cost[..., sets[..., 0], sets[..., 1]].sum(dim=-1)


@lru_cache
def _sets(num_blocks: int, drop: int, most_ranges: int) -> Tensor:
    return torch.tensor(list(_list_sets(num_blocks, drop, most_ranges)))


def _list_sets(num_blocks: int, drop: int, most_ranges: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for start in reversed(range(num_blocks - drop + 1)):
        yield NOTHING, (start, start + drop)
    if most_ranges == 1:
        return
    for second in reversed(range(num_blocks)):
        for length in range(1, min(drop, num_blocks - second + 1)):
            for first in reversed(range(second - (drop - length))):  # a block is kept between them
                yield (first, first + drop - length), (second, second + length)
