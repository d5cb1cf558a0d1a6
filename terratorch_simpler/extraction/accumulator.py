"""The statistics of all groups so far: what can be told from them, and what of them outlives an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from terratorch_simpler.criteria import Bounds, Criterion, Statistics, bootstrap
from terratorch_simpler.distributed import Processes
from terratorch_simpler.extraction.groups import Group, halves
from terratorch_simpler.extraction.recovery_sums import RecoverySums, drawn_only
from terratorch_simpler.indices import Span
from terratorch_simpler.metrics import LayerSimilarity

GROUPS_TO_TRUST = 8
"""With fewer groups of 64 tiles than this, groups of 32 are used."""
GROUPS_TO_VOTE = 4
"""With fewer groups than this, a bootstrap over groups says nothing."""
CONVERGED_SHARE = 0.95
"""Streaming stops once one depth has won this share of resamples."""


class SimilarityAccumulator:
    """Statistics of groups of 64 tiles, and of their halves until there are enough groups.

    They lie on the CPU: one group is one wait for the device, and summing over processes needs no device.

    Args:
        num_blocks: Blocks of the encoder.
        max_groups: Groups there can be.
        processes: Those that share the groups.
        spans: Ranges of blocks to repair, should they be dropped.

    Attributes:
        special: How many rows of every tile, the last ones, show no patch; they serve the repairs only.
        repairs: Sums for these; None if there is nothing to repair.
    """

    def __init__(self, num_blocks: int, max_groups: int, processes: Processes, spans: Sequence[Span] = ()) -> None:
        self.special = 0
        self.repairs = RecoverySums(spans, processes) if spans else None
        own = {"sync_on_compute": False, "distributed_available_fn": lambda: processes.count > 1}
        self._large = LayerSimilarity(num_blocks, max_groups, **own)
        self._small = LayerSimilarity(num_blocks, 2 * (GROUPS_TO_TRUST - 1), **own)
        self._processes = processes

    def add(self, group: Group, features: Tensor) -> None:
        """Compare the rows of a group, in the process that owns it; may be done again if memory runs out on the way.

        Args:
            group: The group.
            features: Rows of all its tiles before the first block and after every block, (L + 1, m, D).
        """
        drawn, rows = drawn_only(group, features, self.special)
        tiles = len(group.tiles)
        parts = [(self._large, group.number, 0, tiles)]
        if group.number < GROUPS_TO_TRUST - 1:
            for half, (start, end) in enumerate(pairwise(accumulate(halves(tiles), initial=0))):
                parts.append((self._small, 2 * group.number + half, start, end))
        for metric, slot, start, end in parts:
            metric.update(drawn[:, rows[start] : rows[end]], end - start, slot)
        if self.repairs is not None:
            self.repairs.wait(group, features, self.special)

    def tiles(self, count: int) -> int:
        """Tiles in the first groups."""
        return int(self._large.tiles[:count].sum())

    def votes(self, count: int, criterion: Criterion, bounds: Bounds, seed: int) -> Mapping[int, float] | None:
        """Bootstrap votes over the first groups, or None if these are too few, or have no part in the choice."""
        if criterion.needs_labels:
            return None
        metric, slots = self._best(count)
        sums = metric.sums(slots)
        if not criterion.needs_similarity or criterion.needs_labels:
            return None
        return None if len(sums) < GROUPS_TO_VOTE else bootstrap(criterion, sums, bounds, seed)

    def statistics(self, count: int) -> Statistics:
        """Statistics over the first groups."""
        metric, slots = self._best(count)
        return metric.statistics(slots)

    def rows(self, count: int) -> int:
        """Rows of tokens in the first groups."""
        return int(self._large.rows[:count].sum())

    def check(self, count: int) -> None:
        """Raise if the first groups cannot be compared."""
        metric, slots = self._best(count)
        metric.check(slots)

    def __enter__(self) -> SimilarityAccumulator:
        """See the groups of all processes."""
        for metric in (self._large, self._small):
            metric.sync(process_group=self._processes.group)
        return self

    def __exit__(self, *_: object) -> None:
        """See those of this process again, to add to them."""
        for metric in (self._large, self._small):
            metric.unsync(should_unsync=metric._is_synced)

    def state(self, count: int) -> dict[str, Any]:
        """The first groups, as tensors."""
        return {"large": _first(self._large, count), "small": _first(self._small, 2 * count)}

    @staticmethod
    def consistent(state: Mapping[str, Any]) -> bool:
        """Whether the groups of a state are those that it says it holds."""
        filled = state["large"]["tiles"] > 0
        first = bool(filled[: state["groups"]].all()) and not filled[state["groups"] :].any()
        return first and int(state["large"]["tiles"].sum()) == state["tiles"]

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` has told, in one process: the sums are over all of them."""
        self._large.load_state_dict(state["large"])
        self._small.load_state_dict(state["small"])

    def _best(self, count: int) -> tuple[LayerSimilarity, int]:
        """The statistics to believe for the first groups, and how many of their slots."""
        return (self._large, count) if count >= GROUPS_TO_TRUST else (self._small, 2 * count)


def _first(metric: LayerSimilarity, slots: int) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in metric.state_dict().items()}
    for value in state.values():
        value[slots:] = 0
    return state
