"""Angular distance: drop the contiguous range of blocks that turns the tokens least."""

from __future__ import annotations

from torch import Tensor

from terratorch_simpler.criteria.base import Bounds
from terratorch_simpler.criteria.budget import BudgetCriterion
from terratorch_simpler.criteria.ranges import RangeSets
from terratorch_simpler.criteria.statistics import Statistics
from terratorch_simpler.indices import Span


class Angular(BudgetCriterion):
    """Drop the contiguous range with the least mean arccos(cos) / pi between its input and its output.

    Source: Gromov et al., arXiv 2403.17887, section 3. Of ranges that cost the same the last one is dropped (ours).
    """

    name = "angular"

    def spans(self, num_blocks: int, bounds: Bounds) -> list[Span]:
        """Ranges of as many blocks as are dropped."""
        return [(i, j) for i, j in super().spans(num_blocks, bounds) if j - i == self.drop_blocks]

    def score(self, found: Statistics, depths: list[int]) -> Tensor:
        """Minus the angular distance of the range that is dropped."""
        return RangeSets.of(found.num_blocks, depths, most_ranges=1).score(found.angle)

    def kept(self, found: Statistics, depths: list[int]) -> Tensor:
        """All but the range."""
        return RangeSets.of(found.num_blocks, depths, most_ranges=1).kept(found.angle)
