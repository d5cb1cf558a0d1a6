"""Layer similarity as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchmetrics import Metric

from terratorch_simpler.criteria import Bounds, Criterion, GroupSums, Statistics, bootstrap
from terratorch_simpler.errors import DegenerateFeaturesError
from terratorch_simpler.functional.angles import angle_sums
from terratorch_simpler.functional.hsic import MIN_ROWS, check_features, hsic_matrix, layer_normed, moments, tile_means
from terratorch_simpler.plan import MIN_BOOTSTRAP_GROUPS


class LayerSimilarity(Metric):
    """Linear CKA between the blocks of an encoder, with cosines and angles of the same tokens, over groups of tiles.

    All states are sums with one slot per group. A rank leaves zeros in the slots of groups it does not update, so summing
    over ranks gives the same bits however groups are spread over them, and the bootstrap finds them in stream order.

    Args:
        num_blocks: Number of blocks L; with the input of the first one there are L + 1 states of a token.
        max_groups: Number of slots G; memory is 5 * G * (L + 1) ** 2 * 8 bytes, whatever the number of tiles.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    hsic: Tensor
    hsic_layer_norm: Tensor
    hsic_tile_mean: Tensor
    cosine: Tensor
    angle: Tensor
    rows: Tensor
    tiles: Tensor
    mean_square: Tensor
    variance: Tensor
    not_finite: Tensor

    def __init__(self, num_blocks: int, max_groups: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        states = num_blocks + 1
        for name in ("hsic", "hsic_layer_norm", "hsic_tile_mean", "cosine", "angle"):
            self.add_state(name, torch.zeros(max_groups, states, states, dtype=torch.float64), "sum")
        for name in ("mean_square", "variance"):
            self.add_state(name, torch.zeros(max_groups, states, dtype=torch.float64), "sum")
        self.add_state("not_finite", torch.zeros(max_groups, states, dtype=torch.int64), "sum")
        for name in ("rows", "tiles"):
            self.add_state(name, torch.zeros(max_groups, dtype=torch.int64), "sum")
        self.persistent(True)  # an interrupted pass resumes from its state_dict

    def update(self, features: Tensor, tiles: int | Sequence[int], group: int) -> None:
        """Set the slot of one group. Waits for the device of the features once, and only if the states lie on another one.

        Args:
            features: Rows of the group before the first block and after every block, shape (L + 1, m, D).
            tiles: How many tiles the rows came from, each with as many; or the first row of every tile, and m at the end.
            group: Slot of the group: its number in stream order.
        """
        offsets = _even_offsets(features.shape[1], tiles) if isinstance(tiles, int) else tiles
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        not_finite, mean_square, variance = moments(wide)
        hsic = hsic_matrix(wide)
        layer_norm = hsic_matrix(layer_normed(wide))
        means = tile_means(wide, offsets)
        tile_mean = hsic_matrix(means) if means.shape[1] >= MIN_ROWS else torch.zeros_like(hsic)
        cosine, angle = angle_sums(wide)
        values = {"not_finite": not_finite, "mean_square": mean_square, "variance": variance,
                  "hsic": hsic, "hsic_layer_norm": layer_norm, "hsic_tile_mean": tile_mean,
                  "cosine": cosine, "angle": angle}  # fmt: skip
        # One copy, one wait. Whole numbers are exact in float64.
        flat = torch.cat([value.double().flatten() for value in values.values()]).to(self.hsic.device)
        parts = flat.split([value.numel() for value in values.values()])
        # Assigned, not added: if memory runs out on the way, the group is updated again.
        for (name, value), part in zip(values.items(), parts, strict=True):
            getattr(self, name)[group] = part.view(value.shape)
        self.rows[group] = features.shape[1]
        self.tiles[group] = len(offsets) - 1

    def compute(self) -> Tensor:
        """Similarity S of the blocks, (L, L), float64, over all groups of all ranks; raises as :meth:`statistics`."""
        return self.statistics().similarity

    def statistics(self, groups: int | None = None) -> Statistics:
        """Statistics over the groups of this rank, or of all while synchronised.

        Args:
            groups: Number of groups from the first; by default all.

        Raises:
            DegenerateFeaturesError: If a block's output is constant or not finite, or there is no group yet.
        """
        self.check(groups)
        return self.sums(groups).total()

    def check(self, groups: int | None = None) -> None:
        """Raise if the features of the groups cannot be compared (see :meth:`statistics`)."""
        if not self.tiles[:groups].any():
            msg = "There are no rows of tokens to compare; at least one group of tiles is needed: give more tiles."
            raise DegenerateFeaturesError(msg)
        # The input of the first block may be constant: few criteria look at it.
        check_features(*(value[:groups, 1:].sum(dim=0) for value in (self.not_finite, self.mean_square, self.variance)))

    def sums(self, groups: int | None = None) -> GroupSums:
        """Sums of the groups that were added, in stream order."""
        filled = self.tiles[:groups] > 0
        return GroupSums(*(value[:groups][filled] for value in (self.hsic, self.cosine, self.angle, self.rows)))

    def conventions(self, groups: int | None = None) -> dict[str, Statistics]:
        """Statistics by what a row is: a ``raw`` token, a token after ``LayerNorm``, or the ``tile mean`` of the tokens.

        Cosines and angles are those of raw tokens in all of them.

        Args:
            groups: Number of groups from the first; by default all.
        """
        raw = self.sums(groups).total()
        filled = self.tiles[:groups] > 0
        others = {"LayerNorm": self.hsic_layer_norm, "tile mean": self.hsic_tile_mean}
        return {"raw": raw} | {name: replace(raw, hsic=value[:groups][filled].sum(dim=0)) for name, value in others.items()}

    def bootstrap(
        self, criterion: Criterion, bounds: Bounds, seed: int, groups: int | None = None
    ) -> Mapping[int, float] | None:
        """Share of bootstrap resamples over the groups that choose each depth; None with fewer than four groups.

        Args:
            criterion: Criterion that chooses from each resample.
            bounds: Bounds on the kept depth.
            seed: Seed of the resamples.
            groups: Number of groups from the first; by default all.
        """
        sums = self.sums(groups)
        return None if len(sums) < MIN_BOOTSTRAP_GROUPS else bootstrap(criterion, sums, bounds, seed)


def _even_offsets(rows: int, tiles: int) -> list[int]:
    """First row of each of so many tiles that share the rows evenly, and their number at the end."""
    return [tile * rows // tiles for tile in range(tiles + 1)]
