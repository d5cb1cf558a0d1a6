"""Criteria that drop ranges of blocks: angular distance and CKA intervals. All possible ranges are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import TIE, Bounds, BudgetCriterion
from terratorch_simpler.criteria.statistics import Statistics
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.indices import Span

EMPTY: Span = (0, 0)
"""An empty range, at no cost."""


@dataclass(frozen=True)
class RangeSets:
    """For each of some depths, all sets of at most one or two separated ranges that can be dropped to reach it.

    A range (i, j) drops what lies between state i and state j: the blocks i to j - 1, 0-based.

    Attributes:
        num_blocks: Blocks L of the intact encoder.
        sets: For each depth, (K, 2, 2): K sets of two ranges, in the order in which ties are broken.
    """

    num_blocks: int
    sets: tuple[Tensor, ...]

    @classmethod
    def of(cls, num_blocks: int, depths: list[int], most_ranges: int) -> RangeSets:
        """List all sets.

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
        """Kept blocks at the least cost for every depth; ties go to the first set.

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
        yield EMPTY, (start, start + drop)
    if most_ranges == 1:
        return
    for second in reversed(range(num_blocks)):
        for length in range(1, min(drop, num_blocks - second + 1)):
            for first in reversed(range(second - (drop - length))):  # a block is kept between them
                yield (first, first + drop - length), (second, second + length)


class Angular(BudgetCriterion):
    """Drop the contiguous range with the least mean arccos(cos) / pi between its input and its output.

    Source: Gromov et al., arXiv 2403.17887, section 3. Of ranges that cost the same the last one is dropped (ours).
    """

    name = "angular"
    description = "Drops the range of blocks with the least mean angle between its input and its output."
    papers: ClassVar[Mapping[str, str]] = {"2403.17887": "Gromov et al.: angular distance of a range of blocks"}

    def spans(self, num_blocks: int, bounds: Bounds) -> list[Span]:
        """Ranges of ``drop_blocks`` blocks."""
        return [(i, j) for i, j in super().spans(num_blocks, bounds) if j - i == self.drop_blocks]

    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Minus the angular distance of the dropped range."""
        return RangeSets.of(statistics.num_blocks, depths, most_ranges=1).score(statistics.angle)

    def kept(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """All blocks but the dropped range."""
        return RangeSets.of(statistics.num_blocks, depths, most_ranges=1).kept(statistics.angle)


class CkaIntervals(BudgetCriterion):
    """Drop at most ``ranges`` separated ranges, each at the cost 1 - CKA(input, output of the range); costs add.

    Source: arXiv 2609.36842. All sets of ranges are compared. *Ours:* where one range costs no more than two, one is
    dropped; of sets that cost the same, that whose ranges lie last.

    Args:
        drop_blocks: Number of blocks to drop, in all ranges together.
        ranges: Most ranges, 1 or 2; between two of them at least one block is kept.

    Raises:
        ConfigurationError: If the budget or the number of ranges makes no sense.
    """

    name = "cka_intervals"
    description = "Drops the one or two ranges of blocks across which the similarity falls least."
    papers: ClassVar[Mapping[str, str]] = {"2609.36842": "ranges of blocks by CKA"}

    def __init__(self, drop_blocks: int, ranges: int = 2) -> None:
        super().__init__(drop_blocks)
        if isinstance(ranges, bool) or ranges not in (1, 2):
            msg = f"Found ranges {ranges!r} for criterion 'cka_intervals', expected 1 or 2: change it."
            raise ConfigurationError(msg)
        self.ranges = ranges

    @property
    def args(self) -> dict[str, object]:  # noqa: D102
        return {**super().args, "ranges": self.ranges}

    def spans(self, num_blocks: int, bounds: Bounds) -> list[Span]:
        """Ranges of all compared sets; with ``ranges=1`` only those of ``drop_blocks`` blocks."""
        (sets,) = RangeSets.of(num_blocks, self.allowed(num_blocks, bounds), self.ranges).sets
        return sorted({(start, end) for start, end in sets.flatten(0, 1).tolist()} - {EMPTY})

    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Minus the cost of the dropped ranges."""
        return RangeSets.of(statistics.num_blocks, depths, self.ranges).score(1 - statistics.spans)

    def kept(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """All but the ranges."""
        return RangeSets.of(statistics.num_blocks, depths, self.ranges).kept(1 - statistics.spans)
