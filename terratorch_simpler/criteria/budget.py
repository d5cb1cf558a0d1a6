"""What rules with a budget have in common: how many blocks to drop is said, which ones is found."""

from __future__ import annotations

from terratorch_simpler.criteria.base import Bounds, Criterion
from terratorch_simpler.errors import ConfigurationError, DepthError
from terratorch_simpler.indices import Span


class BudgetCriterion(Criterion):
    """Drop a given number of blocks at the least cost; the score of a depth is minus the cost of getting there.

    Args:
        drop_blocks: Number of blocks to drop.

    Raises:
        ConfigurationError: If it is not at least 1.
    """

    drop_blocks: int

    def __init__(self, drop_blocks: int) -> None:
        """Take the budget."""
        if isinstance(drop_blocks, bool) or not isinstance(drop_blocks, int) or drop_blocks < 1:
            msg = f"Found drop_blocks {drop_blocks!r} for criterion '{self.name}', expected a number from 1: change it."
            raise ConfigurationError(msg)
        self.drop_blocks = drop_blocks

    @property
    def args(self) -> dict[str, object]:
        """The budget."""
        return {"drop_blocks": self.drop_blocks}

    def depths(self, num_blocks: int) -> range:
        """Any depth that drops something.

        Raises:
            DepthError: If the budget leaves no block.
        """
        if not self.drop_blocks < num_blocks:
            msg = (
                f"Found drop_blocks {self.drop_blocks} for an encoder of {num_blocks} blocks, expected 1 to "
                f"{num_blocks - 1}: change drop_blocks."
            )
            raise DepthError(msg)
        return range(1, num_blocks)

    def spans(self, num_blocks: int, bounds: Bounds) -> list[Span]:
        """All ranges of at most as many blocks as are dropped."""
        self.allowed(num_blocks, bounds)
        return [(i, i + n) for n in range(1, self.drop_blocks + 1) for i in range(num_blocks - n + 1)]
