"""The statistics of all groups so far: what can be told from them, and what of them outlives an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from terratorch_simpler.criteria import Bounds, Criterion, vote
from terratorch_simpler.measure.groups import Group, halves
from terratorch_simpler.processes import Processes
from terratorch_simpler.similarity import GroupedCKA

GROUPS_TO_TRUST = 8
"""With fewer groups of 64 tiles than this, groups of 32 are used."""
GROUPS_TO_VOTE = 4
"""With fewer groups than this, a bootstrap over groups says nothing."""
SETTLED_SHARE = 0.95
"""Streaming stops once one depth has won this share of resamples."""


class Pool:
    """Statistics of groups of 64 tiles, and of their halves until there are enough groups.

    They lie on the CPU: one group is one wait for the device, and summing over processes needs no device.

    Args:
        num_blocks: Blocks of the encoder.
        max_groups: Groups there can be.
        processes: Those that share the groups.
    """

    def __init__(self, num_blocks: int, max_groups: int, processes: Processes) -> None:
        self.count = 0
        own = {"sync_on_compute": False, "distributed_available_fn": lambda: processes.count > 1}
        self._large = GroupedCKA(num_blocks, max_groups, **own)
        self._small = GroupedCKA(num_blocks, 2 * (GROUPS_TO_TRUST - 1), **own)
        self._processes = processes

    def add(self, group: Group, features: Tensor) -> None:
        """Compare the rows of a group, in the process that owns it.

        Args:
            group: The group.
            features: Rows of all its tiles, (L, m, D).
        """
        parts = [(self._large, group.number, group.tiles)]
        if group.number < GROUPS_TO_TRUST - 1:
            start = 0
            for half, size in enumerate(halves(len(group.tiles))):
                parts.append((self._small, 2 * group.number + half, group.tiles[start : start + size]))
                start += size
        rows = {tile.position: tile.rows for tile in group.tiles}
        begin = dict(zip(rows, _starts(list(rows.values())), strict=True))
        for metric, slot, tiles in parts:
            if metric.tiles[slot]:  # memory ran out after this part had been added
                continue
            first = begin[tiles[0].position]
            span = features[:, first : begin[tiles[-1].position] + rows[tiles[-1].position]]
            metric.update(span, len(tiles), slot)

    def tiles(self, count: int) -> int:
        """Tiles in the first groups."""
        return int(self._large.tiles[:count].sum())

    def votes(self, count: int, criterion: Criterion, bounds: Bounds, seed: int) -> Mapping[int, float] | None:
        """Bootstrap votes over the first groups, or None if these are too few."""
        numerators = self._best(count)[0].filled(self._best(count)[1])
        return None if len(numerators) < GROUPS_TO_VOTE else vote(criterion, numerators, bounds, seed)

    def similarity(self, count: int) -> Tensor:
        """Similarity of the blocks over the first groups, (L, L)."""
        metric, slots = self._best(count)
        return metric.similarity(slots)

    def rows(self, count: int) -> int:
        """Rows of tokens in the first groups."""
        return int(self._large.rows[:count].sum())

    def check(self, count: int) -> None:
        """Raise if the first groups cannot be compared."""
        metric, slots = self._best(count)
        metric.check(slots)

    def __enter__(self) -> Pool:
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

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` has told, in one process: the sums are over all of them."""
        self._large.load_state_dict(state["large"])
        self._small.load_state_dict(state["small"])

    def _best(self, count: int) -> tuple[GroupedCKA, int]:
        """The statistics to believe for the first groups, and how many of their slots."""
        return (self._large, count) if count >= GROUPS_TO_TRUST else (self._small, 2 * count)


def _first(metric: GroupedCKA, slots: int) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in metric.state_dict().items()}
    for value in state.values():
        value[slots:] = 0
    return state


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *torch.tensor(sizes).cumsum(0).tolist()][:-1]
