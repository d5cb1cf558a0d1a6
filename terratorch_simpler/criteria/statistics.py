"""Input of the criteria: similarity of the states of an encoder, before and after every block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from terratorch_simpler.errors import DegenerateFeaturesError
from terratorch_simpler.functional.hsic import draw_groups, normalise_hsic


@dataclass(frozen=True)
class Labelled:
    """Features with labels, for criteria that require them.

    Attributes:
        features: After every block, (L, N, D), float32.
        labels: Class of each of the N rows, (N,), int64.
    """

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Statistics:
    """Pairwise similarity of L + 1 states: state 0 is the input of the first block, state l the output of block l.

    Leading dimensions are resamples of a bootstrap; without any, they are over all tiles.

    Attributes:
        hsic: HSIC numerators, (..., L + 1, L + 1), float64.
        cosine: Mean token cosine, (..., L + 1, L + 1).
        angle: Mean angular distance arccos(cosine) / pi, (..., L + 1, L + 1).
        labelled: Features with labels; None unless the criterion needs them.
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
    """Sums per group of tiles, from which :class:`Statistics` are computed.

    Attributes:
        hsic: HSIC numerators of G groups, (G, L + 1, L + 1), float64.
        cosine: Token cosines, summed over the rows of each group, (G, L + 1, L + 1).
        angle: Angular distances, summed over the rows of each group, (G, L + 1, L + 1).
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
        """Statistics over all groups."""
        rows = self.rows.sum()
        return Statistics(self.hsic.sum(dim=0), self.cosine.sum(dim=0) / rows, self.angle.sum(dim=0) / rows)

    def resampled(self, resamples: int, seed: int) -> Statistics:
        """Statistics of ``resamples`` bootstrap resamples of the groups, as leading dimension."""
        counts = draw_groups(len(self), resamples, seed)
        rows = (counts @ self.rows.double())[:, None, None]

        def total(values: Tensor) -> Tensor:
            return torch.einsum("rg,gij->rij", counts, values)

        return Statistics(total(self.hsic), total(self.cosine) / rows, total(self.angle) / rows)
