"""What a rule may look at: how alike the states of an encoder are, before and after every block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from terratorch_simpler.errors import DegenerateFeaturesError
from terratorch_simpler.functional.hsic import draw_groups, normalise_hsic


@dataclass(frozen=True)
class Labelled:
    """Features with labels, for rules that need them.

    Attributes:
        features: After every block, (L, N, D), float32.
        labels: Class of each of the N rows, (N,), int64.
    """

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Statistics:
    """All pairs of the L + 1 states of a token compared: state 0 is the input of the first block, l the output of block l.

    Leading dimensions are draws of a bootstrap; without any, they are over all tiles.

    Attributes:
        hsic: HSIC numerators, (..., L + 1, L + 1), float64.
        cosine: Mean token cosine, (..., L + 1, L + 1).
        angle: Mean angular distance arccos(cosine) / pi, (..., L + 1, L + 1).
        labelled: Features with labels; None unless the rule has asked for them.
    """

    hsic: Tensor
    cosine: Tensor
    angle: Tensor
    labelled: Labelled | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks L of the intact encoder."""
        return self.hsic.shape[-1] - 1

    @cached_property
    def similarity(self) -> Tensor:
        """Linear CKA between the outputs of all blocks, (..., L, L).

        Raises:
            DegenerateFeaturesError: If a block's output does not vary.
        """
        return normalise_hsic(self.hsic[..., 1:, 1:])

    @cached_property
    def spans(self) -> Tensor:
        """Linear CKA between all states, (..., L + 1, L + 1).

        Raises:
            DegenerateFeaturesError: If a state does not vary.
        """
        if not bool((self.hsic[..., 0, 0] > 0).all()):
            msg = (
                "Found an input of the first encoder block that is constant over all tokens, expected one that varies: use "
                "a criterion that compares the outputs of blocks only, such as simpler or knee."
            )
            raise DegenerateFeaturesError(msg)
        return normalise_hsic(self.hsic)


@dataclass(frozen=True)
class GroupSums:
    """What groups of tiles add to :class:`Statistics`.

    Attributes:
        hsic: HSIC numerators of G groups, (G, L + 1, L + 1), float64.
        cosine: Token cosines, summed over the rows of each group, (G, L + 1, L + 1).
        angle: Angular distances, likewise.
        rows: Rows of each group, (G,).
    """

    hsic: Tensor
    cosine: Tensor
    angle: Tensor
    rows: Tensor

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.rows)

    def total(self) -> Statistics:
        """Over all groups."""
        rows = self.rows.sum()
        return Statistics(self.hsic.sum(dim=0), self.cosine.sum(dim=0) / rows, self.angle.sum(dim=0) / rows)

    def resampled(self, resamples: int, seed: int) -> Statistics:
        """Over groups drawn again with replacement, as often as ``resamples`` says."""
        counts = draw_groups(len(self), resamples, seed)
        rows = (counts @ self.rows.double())[:, None, None]

        def all_reduce(values: Tensor) -> Tensor:
            return torch.einsum("rg,gij->rij", counts, values)

        return Statistics(all_reduce(self.hsic), all_reduce(self.cosine) / rows, all_reduce(self.angle) / rows)
