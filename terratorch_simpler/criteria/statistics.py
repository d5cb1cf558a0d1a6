"""Input of the criteria: similarity of the states of an encoder, before and after every block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from terratorch_simpler.errors import DegenerateFeaturesError, LabelsError
from terratorch_simpler.functional.hsic import draw_groups, normalise_hsic
from terratorch_simpler.functional.scores import LabelKind


@dataclass(frozen=True)
class LabelledFeatures:
    """Features with labels, for criteria that require them.

    Attributes:
        features: After every block, (L, N, D), float32.
        labels: Class of each of the N rows, (N,), int64; its value, float32; or its labels that are 0 or 1, (N, K).
        images: Position in ``names`` of the image each row is of, (N,), int64.
        names: First file of every image, or another name that no other image has.
        kind: What the labels are.
        validation: Rows of other images to score on, if there are any.
    """

    features: Tensor
    labels: Tensor
    images: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    names: tuple[str, ...] = ()
    kind: LabelKind = "segmentation"
    validation: LabelledFeatures | None = None


LabelSets = LabelledFeatures | Mapping[str, LabelledFeatures]
"""One label set, or several by name."""


@contextmanager
def naming(label_set: str) -> Iterator[None]:
    """Errors of labels say which label set they are of, if it has a name."""
    try:
        yield
    except LabelsError as err:
        if not label_set:
            raise
        msg = f"Label set '{label_set}': {err}"
        raise LabelsError(msg) from err


@dataclass(frozen=True)
class Statistics:
    """Pairwise similarity of L + 1 states: state 0 is the input of the first block, state l the output of block l.

    Leading dimensions are resamples of a bootstrap; without any, they are over all tiles.

    Attributes:
        hsic: HSIC numerators, (..., L + 1, L + 1), float64.
        cosine: Mean token cosine, (..., L + 1, L + 1).
        angle: Mean angular distance arccos(cosine) / pi, (..., L + 1, L + 1).
        labelled: Features with labels; None unless the criterion needs them. Several label sets by name only if it probes.
        progress: Called by a criterion that takes long with the number of blocks it is done with, over all label sets.
    """

    hsic: Tensor
    cosine: Tensor
    angle: Tensor
    labelled: LabelSets | None = None
    progress: Callable[[int], None] | None = None

    @classmethod
    def of_labels(cls, labelled: LabelSets) -> Statistics:
        """Labels alone, where blocks were not compared: no number but NaN stands for the rest."""
        one = labelled if isinstance(labelled, LabelledFeatures) else next(iter(labelled.values()))
        states = len(one.features) + 1
        unknown = torch.full((states, states), torch.nan, dtype=torch.float64)
        return cls(unknown, unknown, unknown, labelled)

    def __getitem__(self, resamples: Tensor) -> Statistics:
        """Statistics of some of the resamples."""
        return Statistics(self.hsic[resamples], self.cosine[resamples], self.angle[resamples], self.labelled)

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

    def resampled(self, resamples: int, seed: int, spread: float = 1.0) -> Statistics:
        """Statistics of bootstrap resamples of the groups, as leading dimension.

        Args:
            resamples: Number of resamples.
            seed: Seed of the draws.
            spread: Factor on how far they lie from the statistics over all groups.
        """
        counts = draw_groups(len(self), resamples, seed)
        rows = (counts @ self.rows.double())[:, None, None]

        def total(values: Tensor) -> Tensor:
            return torch.einsum("rg,gij->rij", counts, values)

        drawn = Statistics(total(self.hsic), total(self.cosine) / rows, total(self.angle) / rows)
        if spread == 1.0:
            return drawn
        middle = self.total()
        return Statistics(
            middle.hsic + spread * (drawn.hsic - middle.hsic),
            middle.cosine + spread * (drawn.cosine - middle.cosine),
            middle.angle + spread * (drawn.angle - middle.angle),
        )


@dataclass(frozen=True)
class Evidence:
    """What a verdict on a choice is judged from.

    Tiles of one file show one place, so they count as one observation, as in a cluster sample with complete correlation
    inside the clusters: the variance of a mean over N tiles is that of N independent ones times the design effect
    sum of n_k^2 / N, where file k has n_k tiles (Kish 1965, Survey Sampling). The stream is shuffled, so a group of tiles
    mixes files, and the variance between groups is that of independent tiles (ours, docs/method.md).

    Attributes:
        groups: Sums per group.
        conventions: Statistics over all groups by what a row is: ``raw``, ``LayerNorm`` or ``tile mean``.
        tiles_of_file: Number of tiles of each file.
    """

    groups: GroupSums
    conventions: Mapping[str, Statistics]
    tiles_of_file: Collection[int]

    @property
    def design_effect(self) -> float:
        """Factor on the variance because tiles share files; 1 if none do."""
        return sum(count * count for count in self.tiles_of_file) / sum(self.tiles_of_file)

    @property
    def num_places(self) -> float:
        """How many files with equally many tiles would weigh as much."""
        return sum(self.tiles_of_file) / self.design_effect
