"""Normal equations of the linear maps that may replace dropped blocks: by token type, with some tiles held out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.extraction.groups import Group
from terratorch_simpler.functional.least_squares import NormalEquations, take_rows
from terratorch_simpler.indices import Span
from terratorch_simpler.pruning.recovery import RecoveryWeights

HELD_OUT = 4
"""Every fourth tile is left out of the fit and used to evaluate it."""
MUCH_MEMORY = 2**30
"""Bytes of sums above which a warning says how many they are: they grow with the ranges that may be dropped."""


class RecoveryStatistics:
    """Normal equations of some spans, for patch tokens and for class and register tokens.

    A group counts only once it is accepted: later groups of the round in which the pass converged do not.

    Args:
        spans: Ranges that may be dropped.
        processes: Ranks that share the groups.

    Attributes:
        patch: Normal equations over patch tokens.
        special: The same over class and register tokens.
    """

    def __init__(self, spans: Sequence[Span], processes: Processes) -> None:
        self.patch = NormalEquations(spans)
        self.special = NormalEquations(spans)
        self._processes = processes
        self._warned = False
        self._pending: dict[int, tuple[Group, Tensor, int]] = {}

    def add(self, group: Group, features: Tensor, special: int) -> None:
        """Hold the rows of a group until it is accepted.

        Args:
            group: The group.
            features: Rows of all its tiles in every state, (L + 1, m, D).
            special: How many rows of each tile, the last ones, are class and register tokens.
        """
        if not self._warned:
            self._warned = True
            self._warn_if_large(features.shape[-1], special)
        self._pending[group.number] = group, features, special

    def _warn_if_large(self, width: int, special: int) -> None:
        needed = self.patch.nbytes(width) + (self.special.nbytes(width) if special else 0)
        if needed > MUCH_MEMORY and self._processes.first:
            warnings.warn(
                f"Found {len(self.patch.spans)} ranges of blocks that may be dropped, whose sums for recovery: linear take "
                f"{needed / 2**30:.1f} GiB in every process, expected at most {MUCH_MEMORY / 2**30:g}: should that be too "
                "much, use criterion angular or simpler, or ranges: 1 for cka_intervals, which consider fewer ranges.",
                SimplerWarning,
                stacklevel=2,
            )

    def accept(self, count: int) -> None:
        """Add the rows of the first ``count`` groups to the sums."""
        for number in sorted(number for number in self._pending if number < count):
            group, features, special = self._pending.pop(number)
            # Row numbers on the host: those to fit on, and those to evaluate on.
            patches: tuple[list[int], list[int]] = ([], [])
            others: tuple[list[int], list[int]] = ([], [])
            start = 0
            for place, tile in enumerate(group.tiles):
                held_out = place % HELD_OUT == HELD_OUT - 1
                middle, end = start + tile.rows - special, start + tile.rows
                patches[held_out].extend(range(start, middle))
                others[held_out].extend(range(middle, end))
                start = end
            for equations, (fit, evaluate) in ((self.patch, patches), (self.special, others)):
                if fit or evaluate:
                    equations.add(features, fit, evaluate)

    def all_reduce(self, width: int) -> None:
        """Sum over all ranks; every rank calls it once, at the end.

        Args:
            width: Width D of a token.
        """
        self._pending.clear()
        if self._processes.count > 1:
            for equations in (self.patch, self.special):
                equations.all_reduce(self._processes.all_reduce, width)

    def solve(self, spans: Sequence[Span]) -> dict[int, RecoveryWeights]:
        """Weights of the maps of some spans, by the state before each.

        Class and register tokens share the map of the patches where there are too few of them for one of their own.

        Raises:
            RecoveryError: If there are too few patch tokens.
        """
        own = self.special.sufficient
        return {
            span[0]: RecoveryWeights(self.patch.weight(span).float(), self.special.weight(span).float() if own else None)
            for span in spans
        }


def without_special(group: Group, features: Tensor, special: int) -> tuple[Tensor, list[int]]:
    """Drop the last ``special`` rows of every tile, which serve the recovery only.

    Args:
        group: The group.
        features: Rows of all its tiles, (L + 1, m, D).
        special: How many rows of each tile are left out.

    Returns:
        The other rows, (L + 1, m', D), and the first row of every tile, with m' at the end.
    """
    offsets = list(accumulate((tile.rows - special for tile in group.tiles), initial=0))
    if not special:
        return features, offsets
    index = [row + place * special for place in range(len(group.tiles)) for row in range(offsets[place], offsets[place + 1])]
    return take_rows(features, index), offsets
