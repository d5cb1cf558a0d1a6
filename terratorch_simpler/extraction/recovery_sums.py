"""What a pass adds up for maps in the place of dropped blocks: patch tokens and others apart, some tiles held out."""

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
"""One tile in so many is not fitted on but judged on."""
MUCH_MEMORY = 2**30
"""Bytes of sums from which it is said how many they are: they grow with the ranges that may be dropped."""


class RecoverySums:
    """Sums for the maps of some spans.

    A group is added only once it has been judged: others, which came in the same round after the one that settled the
    depth, must not count.

    Args:
        spans: Ranges that may be dropped.
        processes: Those that share the groups.
    """

    def __init__(self, spans: Sequence[Span], processes: Processes) -> None:
        """Nothing is added yet."""
        self.patch = NormalEquations(spans)
        self.special = NormalEquations(spans)
        self._processes = processes
        self._warned = False
        self._waiting: dict[int, tuple[Group, Tensor, int]] = {}

    def wait(self, group: Group, features: Tensor, special: int) -> None:
        """Hold the rows of a group until it is judged.

        Args:
            group: The group.
            features: Rows of all its tiles in every state, (L + 1, m, D).
            special: How many rows of each tile, the last ones, show no patch.
        """
        if not self._warned:
            self._warned = True
            self._warn_if_large(features.shape[-1], special)
        self._waiting[group.number] = group, features, special

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
        """Add the first groups."""
        for number in sorted(number for number in self._waiting if number < count):
            group, features, special = self._waiting.pop(number)
            # Numbers of the rows, made on the host: those to fit on, and those to judge on.
            patches: tuple[list[int], list[int]] = ([], [])
            others: tuple[list[int], list[int]] = ([], [])
            start = 0
            for place, tile in enumerate(group.tiles):
                held_out = place % HELD_OUT == HELD_OUT - 1
                middle, end = start + tile.rows - special, start + tile.rows
                patches[held_out].extend(range(start, middle))
                others[held_out].extend(range(middle, end))
                start = end
            for sums, (fit, judge) in ((self.patch, patches), (self.special, others)):
                if fit or judge:
                    sums.add(features, fit, judge)

    def merge(self, width: int) -> None:
        """See the sums of all processes; every process calls it once, at the end.

        Args:
            width: Width D of a token.
        """
        self._waiting.clear()
        if self._processes.count > 1:
            for sums in (self.patch, self.special):
                sums.merge(self._processes.all_reduce, width)

    def maps(self, spans: Sequence[Span]) -> dict[int, RecoveryWeights]:
        """The maps of some spans, by the state before each.

        Class and register tokens share the map of the patches where there are too few of them for one of their own.

        Raises:
            RecoveryError: If there are too few patch tokens.
        """
        own = self.special.enough
        return {
            span[0]: RecoveryWeights(self.patch.weight(span).float(), self.special.weight(span).float() if own else None)
            for span in spans
        }


def drawn_only(group: Group, features: Tensor, special: int) -> tuple[Tensor, list[int]]:
    """The rows to compare, and where those of each tile begin and end, without the last ones of every tile.

    Args:
        group: The group.
        features: Rows of all its tiles, (L + 1, m, D).
        special: How many rows of each tile are left out.
    """
    ends = list(accumulate((tile.rows - special for tile in group.tiles), initial=0))
    if not special:
        return features, ends
    index = [at + place * special for place, tile in enumerate(group.tiles) for at in range(ends[place], ends[place + 1])]
    return take_rows(features, index), ends
