"""The additive state of a pass: what every group of tiles adds, each in a slot of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from terratorch_simpler.criteria import GroupSums, Statistics
from terratorch_simpler.errors import DegenerateFeaturesError
from terratorch_simpler.functional.angles import angle_sums
from terratorch_simpler.functional.hsic import check_features, hsic_matrix, moments


class LayerSimilarity(Metric):
    """Sums of every group of tiles.

    All states are sums. A process that did not see a group leaves zeros in its slot, so summing over processes gives
    the same bits however groups were spread over them, and the bootstrap finds the groups in stream order.

    Args:
        num_blocks: Number of blocks L; with the input of the first one there are L + 1 states of a token.
        max_groups: Number of slots G; memory is 3 * G * (L + 1) ** 2 * 8 bytes, whatever the number of tiles.
    """

    full_state_update = False
    hsic: Tensor
    cosine: Tensor
    angle: Tensor
    rows: Tensor
    tiles: Tensor
    mean_square: Tensor
    variance: Tensor
    not_finite: Tensor

    def __init__(self, num_blocks: int, max_groups: int, **kwargs: object) -> None:
        """Declare the states; keyword arguments go to :class:`torchmetrics.Metric`."""
        super().__init__(**kwargs)
        states = num_blocks + 1
        for name in ("hsic", "cosine", "angle"):
            self.add_state(name, torch.zeros(max_groups, states, states, dtype=torch.float64), "sum")
        for name in ("mean_square", "variance"):
            self.add_state(name, torch.zeros(max_groups, states, dtype=torch.float64), "sum")
        self.add_state("not_finite", torch.zeros(max_groups, states, dtype=torch.int64), "sum")
        for name in ("rows", "tiles"):
            self.add_state(name, torch.zeros(max_groups, dtype=torch.int64), "sum")
        self.persistent(True)  # a long pass that was ended goes on from its state_dict

    def update(self, features: Tensor, tiles: int, group: int) -> None:
        """Put one group in its slot. Waits for the device of the features once, and only if the states lie on another one.

        Args:
            features: Rows of the group before the first block and after every block, shape (L + 1, m, D).
            tiles: How many tiles the rows came from.
            group: Slot of the group: its number in stream order.
        """
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        not_finite, mean_square, variance = moments(wide)
        hsic = hsic_matrix(wide)
        cosine, angle = angle_sums(wide)
        found = {"not_finite": not_finite, "mean_square": mean_square, "variance": variance,
                 "hsic": hsic, "cosine": cosine, "angle": angle}  # fmt: skip
        # One copy, one wait. Whole numbers are exact in float64.
        together = torch.cat([value.double().flatten() for value in found.values()]).to(self.hsic.device)
        ready = together.split([value.numel() for value in found.values()])
        # Set and not added: memory may run out on the way, and the group come again.
        for (name, value), part in zip(found.items(), ready, strict=True):
            getattr(self, name)[group] = part.view(value.shape)
        self.rows[group] = features.shape[1]
        self.tiles[group] = tiles

    def compute(self) -> Tensor:
        """Similarity S of the blocks, (L, L), float64, over all groups seen by all processes; errors as below."""
        return self.statistics().similarity

    def statistics(self, groups: int | None = None) -> Statistics:
        """Statistics over the groups of this process.

        Args:
            groups: Number of groups from the first; by default all.

        Raises:
            DegenerateFeaturesError: If a block's output is constant or not finite, or nothing was added yet.
        """
        self.check(groups)
        return self.sums(groups).total()

    def check(self, groups: int | None = None) -> None:
        """Raise if the features of the groups cannot be compared (see :meth:`statistics`)."""
        if not self.tiles[:groups].any():
            msg = "Found no rows of tokens to compare, expected at least one group of tiles: give more tiles."
            raise DegenerateFeaturesError(msg)
        # What enters the first block may be constant: few rules look at it.
        check_features(*(value[:groups, 1:].sum(dim=0) for value in (self.not_finite, self.mean_square, self.variance)))

    def sums(self, groups: int | None = None) -> GroupSums:
        """Sums of the groups that were added, in stream order."""
        filled = self.tiles[:groups] > 0
        return GroupSums(*(value[:groups][filled] for value in (self.hsic, self.cosine, self.angle, self.rows)))
