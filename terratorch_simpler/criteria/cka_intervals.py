"""CKA intervals: drop one or two ranges of blocks whose output is most like their input."""

from __future__ import annotations

from torch import Tensor

from terratorch_simpler.criteria.base import Bounds
from terratorch_simpler.criteria.budget import BudgetCriterion
from terratorch_simpler.criteria.ranges import NOTHING, RangeSets
from terratorch_simpler.criteria.statistics import Statistics
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.indices import Span


class CkaIntervals(BudgetCriterion):
    """Drop at most so many separated ranges, each at the cost 1 - CKA(input of the range, output of the range); costs add.

    Source: arXiv 2609.36842. All sets of ranges are compared. *Ours:* where one range costs no more than two, one is
    dropped; of sets that cost the same, that whose ranges lie last.

    Args:
        drop_blocks: Number of blocks to drop, in all ranges together.
        ranges: Most ranges, 1 or 2; between two of them at least one block is kept.

    Raises:
        ConfigurationError: If the budget or the number of ranges makes no sense.
    """

    name = "cka_intervals"

    def __init__(self, drop_blocks: int, ranges: int = 2) -> None:
        """Take budget and number of ranges."""
        super().__init__(drop_blocks)
        if isinstance(ranges, bool) or ranges not in (1, 2):
            msg = f"Found ranges {ranges!r} for criterion 'cka_intervals', expected 1 or 2: change it."
            raise ConfigurationError(msg)
        self.ranges = ranges

    @property
    def args(self) -> dict[str, object]:
        """Budget and number of ranges."""
        return {**super().args, "ranges": self.ranges}

    def spans(self, num_blocks: int, bounds: Bounds) -> list[Span]:
        """The ranges of all sets that are compared: with a single range only those of as many blocks as are dropped."""
        (sets,) = RangeSets.of(num_blocks, self.allowed(num_blocks, bounds), self.ranges).sets
        return sorted({(start, end) for start, end in sets.flatten(0, 1).tolist()} - {NOTHING})

    def score(self, found: Statistics, depths: list[int]) -> Tensor:
        """Minus the cost of what is dropped."""
        return RangeSets.of(found.num_blocks, depths, self.ranges).score(1 - found.spans)

    def kept(self, found: Statistics, depths: list[int]) -> Tensor:
        """All but the ranges."""
        return RangeSets.of(found.num_blocks, depths, self.ranges).kept(1 - found.spans)
