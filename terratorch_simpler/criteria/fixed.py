"""Fixed: keep a given depth or list of blocks."""

from __future__ import annotations

from torch import Tensor

from terratorch_simpler.criteria.base import Bounds, Choice, Criterion
from terratorch_simpler.criteria.statistics import Statistics
from terratorch_simpler.errors import ConfigurationError, DepthError
from terratorch_simpler.indices import Span, resolve_keep, spans_between


class Fixed(Criterion):
    """Keep the given blocks; nothing is measured.

    Args:
        keep: First n blocks, or a list of block numbers (0-based).
        drop_blocks: Number of last blocks to drop, instead of ``keep``.
    """

    name = "fixed"
    description = "Given by hand: nothing was measured."
    needs_similarity = False

    def __init__(self, keep: int | list[int] | None = None, drop_blocks: int | None = None) -> None:
        if (keep is None) == (drop_blocks is None):
            msg = (
                f"Found keep {keep} and drop_blocks {drop_blocks} for criterion 'fixed', expected exactly one of them: "
                "give drop_blocks, or a class_path with init_args keep."
            )
            raise ConfigurationError(msg)
        self.keep = keep
        self.drop_blocks = drop_blocks

    @property
    def args(self) -> dict[str, object]:  # noqa: D102
        return {"keep": self.keep} if self.drop_blocks is None else {"drop_blocks": self.drop_blocks}

    def depths(self, num_blocks: int) -> range:
        """Any depth."""
        return range(1, num_blocks + 1)

    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Zero for every depth: they are not compared."""
        return statistics.hsic.new_zeros(*statistics.hsic.shape[:-2], len(depths))

    def spans(self, num_blocks: int, bounds: Bounds) -> list[Span]:
        """The dropped ranges."""
        return spans_between(self.choose(None, num_blocks, bounds).kept_blocks, num_blocks)

    def choose(self, statistics: Statistics | None, num_blocks: int, bounds: Bounds) -> Choice:  # noqa: ARG002
        """Return the given blocks, checked against the encoder.

        Raises:
            DepthError: If a block does not exist, or the bounds forbid the depth.
        """
        keep = self.keep if self.drop_blocks is None else num_blocks - self.drop_blocks
        kept = resolve_keep(keep, num_blocks)  # type: ignore[arg-type]
        allowed = bounds.within(self.depths(num_blocks), num_blocks)
        if len(kept) not in allowed:
            msg = (
                f"Found {len(kept)} blocks given by hand, expected {allowed[0]} to {allowed[-1]} by min_depth and "
                "max_depth: change one of them."
            )
            raise DepthError(msg)
        return Choice(kept)
