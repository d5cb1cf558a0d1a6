"""Layer similarity over groups of 64 tiles and, as long as there are few of them, over their halves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor

from terratorch_simpler.criteria import Bounds, Criterion, Evidence, Statistics
from terratorch_simpler.distributed import Processes
from terratorch_simpler.extraction.groups import half_group_sizes
from terratorch_simpler.metrics import LayerSimilarity

MIN_FULL_GROUPS = 8
"""With fewer groups of 64 tiles than this, groups of 32 are used."""


class GroupedSimilarity:
    """Two :class:`~terratorch_simpler.metrics.LayerSimilarity`: over full groups, and over halves of the first ones.

    Both lie on the CPU: one group is one wait for the device, and summing over ranks needs no device.

    Args:
        num_blocks: Blocks of the encoder.
        max_groups: Most groups of the pass.
        processes: Ranks that share the groups.
    """

    def __init__(self, num_blocks: int, max_groups: int, processes: Processes) -> None:
        options = {"sync_on_compute": False, "distributed_available_fn": lambda: processes.count > 1}
        self._full = LayerSimilarity(num_blocks, max_groups, **options)
        self._half = LayerSimilarity(num_blocks, 2 * (MIN_FULL_GROUPS - 1), **options)
        self._process_group = processes.group

    def update(self, features: Tensor, offsets: Sequence[int], group: int) -> None:
        """Add a group on the rank that compares it; safe to repeat if memory runs out on the way.

        Args:
            features: Rows of all its tiles before the first block and after every block, (L + 1, m, D).
            offsets: First row of every tile, and m at the end.
            group: Number of the group.
        """
        tiles = len(offsets) - 1
        self._full.update(features, offsets, group)
        if group < MIN_FULL_GROUPS - 1:
            middle = half_group_sizes(tiles)[0]
            for half, (start, end) in enumerate(pairwise(sorted({0, middle, tiles}))):
                first = offsets[start]
                within = [offset - first for offset in offsets[start : end + 1]]
                self._half.update(features[:, first : offsets[end]], within, 2 * group + half)

    def tiles(self, count: int) -> int:
        """Tiles in the first ``count`` groups."""
        return int(self._full.tiles[:count].sum())

    def rows(self, count: int) -> int:
        """Rows of tokens in the first ``count`` groups."""
        return int(self._full.rows[:count].sum())

    def check(self, count: int) -> None:
        """Raise DegenerateFeaturesError if the first ``count`` groups cannot be compared."""
        metric, groups = self._select(count)
        metric.check(groups)

    def bootstrap(self, count: int, criterion: Criterion, bounds: Bounds, seed: int) -> Mapping[int, float] | None:
        """Share of resamples that choose each depth over the first ``count`` groups.

        None if there are too few groups, or the criterion does not look at similarity alone.
        """
        if criterion.needs_labels or not criterion.needs_similarity:
            return None
        metric, groups = self._select(count)
        return metric.bootstrap(criterion, bounds, seed, groups)

    def statistics(self, count: int) -> Statistics:
        """Statistics over the first ``count`` groups."""
        metric, groups = self._select(count)
        return metric.statistics(groups)

    def evidence(self, count: int, tiles_of_file: Collection[int]) -> Evidence:
        """What a verdict on the first ``count`` groups is judged from.

        Args:
            count: Number of groups.
            tiles_of_file: Tiles in these groups by file.
        """
        metric, groups = self._select(count)
        return Evidence(metric.sums(groups), metric.conventions(groups), tiles_of_file)

    @contextmanager
    def summed_over_ranks(self) -> Iterator[None]:
        """Inside, everything is of all ranks; a collective operation, which all of them have to enter."""
        for metric in (self._full, self._half):
            metric.sync(process_group=self._process_group)
        try:
            yield
        finally:
            for metric in (self._full, self._half):
                metric.unsync(should_unsync=metric._is_synced)

    def state(self, count: int) -> dict[str, Any]:
        """The first ``count`` groups, as tensors for a partial result."""
        return {"large": _first_groups(self._full, count), "small": _first_groups(self._half, 2 * count)}

    @staticmethod
    def is_consistent(state: Mapping[str, Any]) -> bool:
        """Whether a state holds the groups and tiles that a partial result says it does."""
        filled = state["large"]["tiles"] > 0
        contiguous = bool(filled[: state["groups"]].all()) and not filled[state["groups"] :].any()
        return contiguous and int(state["large"]["tiles"].sum()) == state["tiles"]

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`; on one rank only, since it holds the sums over all of them."""
        self._full.load_state_dict(state["large"])
        self._half.load_state_dict(state["small"])

    def _select(self, count: int) -> tuple[LayerSimilarity, int]:
        return (self._full, count) if count >= MIN_FULL_GROUPS else (self._half, 2 * count)


def _first_groups(metric: LayerSimilarity, count: int) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in metric.state_dict().items()}
    for value in state.values():
        value[count:] = 0
    return state
