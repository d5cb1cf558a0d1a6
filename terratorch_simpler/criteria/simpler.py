"""SIMPLER: keep the first blocks, up to the depth where representations settle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import Criterion
from terratorch_simpler.criteria.statistics import Statistics
from terratorch_simpler.errors import DepthError

MIN_BLOCKS = 5
"""Below this the candidates 2 <= c <= L - 2 leave no choice (ours)."""


def score_curve(similarity: Tensor, depths: list[int]) -> Tensor:
    """The score g(c) = delta(S[1..c, 1..c]) - delta(S[c+1..L, c+1..L]).

    delta(M) is the mean absolute difference between consecutive rows of M: large among the kept blocks when their
    representations still change, small among the dropped ones when they have settled (SIMPLER, arXiv 2603.19873; the
    score as restated in arXiv 2609.36842, appendix C).

    Args:
        similarity: Similarity of shape (..., L, L).
        depths: Kept depths c, each with 2 <= c <= L - 2, since delta of a 1 x 1 matrix is undefined.

    Returns:
        Scores of shape (..., len(depths)).

    Example:
        >>> s = torch.ones(6, 6)
        >>> s[0, 1:] = s[1:, 0] = 0.2
        >>> score_curve(s, [2, 3, 4])
        tensor([0.8000, 0.4000, 0.2667])
    """
    steps = (similarity[..., 1:, :] - similarity[..., :-1, :]).abs()  # step i leads from row i to row i + 1
    kept = [steps[..., : c - 1, :c].mean(dim=(-2, -1)) for c in depths]
    dropped = [steps[..., c:, c:].mean(dim=(-2, -1)) for c in depths]
    return torch.stack(kept, dim=-1) - torch.stack(dropped, dim=-1)


class Simpler(Criterion):
    """Keep the first c blocks, where c maximises g(c) of :func:`score_curve`.

    The papers give g; taking its maximum, the candidates 2 <= c <= L - 2 and the handling of ties are decisions of this
    package. No labels, no gradients, no threshold.
    """

    name = "simpler"
    description = (
        "Keeps the blocks up to where their outputs stop changing: how much neighbouring rows of the similarity differ "
        "among the kept blocks, less how much among the dropped ones."
    )
    papers: ClassVar[Mapping[str, str]] = {
        "2603.19873": "SIMPLER: the method, its score and its published results",
        "2609.36842": "restates the score of SIMPLER",
    }
    needs_positive_score = True  # below 0, what is dropped changes more than what is kept

    def depths(self, num_blocks: int) -> range:
        """Depths 2 to L - 2.

        Raises:
            DepthError: If the encoder has fewer than five blocks.
        """
        if num_blocks < MIN_BLOCKS:
            msg = (
                f"Found an encoder of {num_blocks} blocks, expected at least {MIN_BLOCKS} to choose a depth from "
                "similarity: give the depth by hand with backbone_keep, or criterion 'fixed' with drop_blocks."
            )
            raise DepthError(msg)
        return range(2, num_blocks - 1)

    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Score g(c) of every depth."""
        return score_curve(statistics.similarity, depths)
